"""Overrides of a command line, before Hydra reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.additions import opened


def named(overrides: Sequence[str]) -> list[str]:
    """The overrides with none for null: Hydra has no null for a group, the empty choice is a file;
    those of the user's own texts and tasks are opened."""
    return opened([re.sub(r"^(experiment|variant)=null$", r"\1=none", each) for each in overrides])
