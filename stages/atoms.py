"""Weighted points that stand for the values of every site; what all codings are fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Atoms:
    """Weighted magnitudes of every site: value, spread (standard deviation inside the atom) and
    weight (sums to one), each [sites, K] float64 and ascending; maximum [sites].

    Unused places at the end have weight 0 and repeat the maximum. negative [sites, K]: the part of
    each weight that is of negative values; extremes [sites, 2]: smallest and largest x; without
    them the distribution is symmetric. `statistics` are what a coding asked for, by name.
    """

    value: Tensor
    spread: Tensor
    weight: Tensor
    maximum: Tensor
    negative: Tensor | None = None
    extremes: Tensor | None = None
    statistics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest signed value of every site, each [sites]."""
        if self.extremes is None:
            return -self.maximum, self.maximum
        low, high = self.extremes.unbind(-1)
        return low, high

    def rows(self, index: Tensor) -> Atoms:
        """The atoms of the sites in `index`."""
        tensors = {k: v[index] for k, v in vars(self).items() if isinstance(v, Tensor)}
        statistics = {n: {k: v[index] for k, v in t.items()} for n, t in self.statistics.items()}
        return replace(self, **tensors, statistics=statistics)

    def scale(self) -> Tensor:
        """The largest magnitude of every site in float32, [sites]."""
        return self.maximum.float()

    def points(self, inside: int = 3) -> tuple[Tensor, Tensor]:
        """Each atom as `inside` equal points with its mean and variance, [sites, K * inside]."""
        steps = torch.arange(inside, dtype=torch.float64) * 2 - (inside - 1)
        steps = steps / steps.square().mean().sqrt() if inside > 1 else steps
        x = (self.value[..., None] + self.spread[..., None] * steps).clamp(min=0)
        weight = (self.weight[..., None] / inside).expand_as(x)
        return x.flatten(1), weight.flatten(1)

    def signed_points(self) -> tuple[Tensor, Tensor]:
        """The points once with either sign, and their weights, [sites, 2 * K * inside]."""
        x, weight = self.points()
        negative = torch.full_like(self.weight, 0.5) if self.negative is None else self.negative
        below = weight * negative.repeat_interleave(x.shape[1] // negative.shape[1], -1)
        return torch.cat([x, -x], -1), torch.cat([weight - below, below], -1)

    def quantile(self, share: float) -> Tensor:
        """The smallest magnitude that at least `share` of the values do not exceed, [sites]."""
        reached = self.weight.cumsum(-1) >= share * (1 - 1e-12)
        first = reached.int().argmax(-1, keepdim=True)
        return self.value.gather(-1, first).squeeze(-1)

    def power(self) -> Tensor:
        """Mean square of every site, [sites]."""
        return ((self.value**2 + self.spread**2) * self.weight).sum(-1)
