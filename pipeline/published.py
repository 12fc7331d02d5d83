"""Numbers that others have published, as rows beside measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stages.errors import InputError

FILE = Path(__file__).parents[1] / "conf/table/published.yaml"


def rows(models: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of some models, in the order of the models; InputError for one that is not there."""
    if not models:
        return []
    known: Any = OmegaConf.to_container(OmegaConf.load(FILE))
    there = dict.fromkeys(row["model"] for row in known["rows"])
    if unknown := [name for name in models if name not in there]:
        raise InputError(f"table.published: got {unknown[0]}; choose among {', '.join(there)}")
    return [row for name in models for row in known["rows"] if row["model"] == name]
