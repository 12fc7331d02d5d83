"""No coding: the row of the ANN, through the same code."""

from __future__ import annotations

from dataclasses import dataclass

from stages.registry import register


@register("coding/dense", was="stages.codings.dense.Dense")
@dataclass(frozen=True)
class Dense:
    """The model as it is; nothing is captured, fitted or patched."""

    name: str = "dense"
