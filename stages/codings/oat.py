"""LAS with outlier-aware thresholds: two hand-set ranges, the fine one for all but the outliers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stages.atoms import Atoms
from stages.codings.las import Las
from stages.errors import InputError
from stages.fitted import Fit
from stages.registry import register


@register("coding/oat", was="stages.codings.oat.Oat")
@dataclass(frozen=True)
class Oat(Las):
    """Normal range up to the `percentile` of |x|, outlier range up to the largest; one of the two
    neurons fires. LAS sets both by hand from statistics, so a percentile stands for the hand.

    Source: LAS, arXiv 2505.09659, OAT neuron.
    """

    name: str = "oat"
    percentile: float = 99.9

    grains = 2
    decode_macs = 2
    gate_comparisons = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 50 <= self.percentile < 100:
            raise InputError(
                f"coding.percentile={self.percentile} for {self.name}: give 50 up to below 100"
            )

    def fit(self, atoms: Atoms) -> Fit:
        normal = atoms.quantile(self.percentile / 100).float()
        # A site that is zero almost everywhere has no normal range of its own.
        outlier = self.largest(atoms).float()
        normal = torch.where(normal > 0, normal, outlier).minimum(outlier)
        return Fit({"scale": torch.stack([normal, outlier], -1)})
