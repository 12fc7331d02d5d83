"""Overrides of a command line, before Hydra reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence


def named(overrides: Sequence[str]) -> list[str]:
    """The overrides with none for null: Hydra has no null for a group, the empty choice is a file."""
    return [re.sub(r"^(experiment|variant)=null$", r"\1=none", each) for each in overrides]
