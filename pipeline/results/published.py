"""Numbers that others have published, as rows beside measured ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from pipeline.results.columns import bounded_perplexity
from stages.errors import InputError

FILE = Path(__file__).parents[2] / "conf/table/published.yaml"


def rows(models: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of some models, in the order of the models; InputError for one that is not there."""
    if not models:
        return []
    known: Any = OmegaConf.to_container(OmegaConf.load(FILE))
    there = dict.fromkeys(row["model"] for row in known["rows"])
    if unknown := [name for name in models if name not in there]:
        raise InputError(f"table.published: got {unknown[0]}; choose among {', '.join(there)}")
    return [row for name in models for row in known["rows"] if row["model"] == name]


def as_measured(row: Mapping[str, Any], source: int) -> dict[str, Any]:
    """A published row in the columns of a measured one; what was not published stays open.

    A perplexity of which only a bound is published, ">100", is infinite and `printed` as that.
    """
    bound = row["ppl"] if isinstance(row["ppl"], str) else None
    return {
        "model": f"{row['model']}, published [{source}]",
        "method": row["method"],
        "coding": "published",
        "grains": row["n"],
        "timesteps": row["T"],
        "conversion_s": row["time"],
        "ppl_mean": row["ppl"] if bound is None else math.inf,
        "printed": bound,
        "acc_mean": math.nan if row["acc"] is None else row["acc"] / 100,
    }


def printed(value: float, bound: Any, error: float) -> str:
    """A perplexity with its error, or the bound of it where that is all that is published."""
    return bounded_perplexity(value, error) if pd.isna(bound) else str(bound)
