"""Weighted points that stand for the values of every site; what all codings are fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

EXTREME_BINS = 16
INSIDE = 3  # points that stand for an atom


@dataclass(frozen=True)
class Atoms:
    """Weighted magnitudes of every site: value, spread (standard deviation inside the atom) and
    weight (sums to one), each [sites, K] float64 and ascending; maximum [sites].

    Unused places at the end have weight 0 and repeat the maximum. negative [sites, K]: the part of
    each weight that is of negative values; extremes [sites, 2]: smallest and largest x; without
    them the distribution is symmetric. gain [sites, K]: what a squared error of one at an atom is in
    units of x squared, where the atoms are values in units of their channels' scales (None: one).
    square [sites]: mean square of x, where the atoms are values about their channels' means. roles:
    what every site is in its layer, where that is known.
    `statistics` are what a coding asked for, by name.
    """

    value: Tensor
    spread: Tensor
    weight: Tensor
    maximum: Tensor
    negative: Tensor | None = None
    extremes: Tensor | None = None
    gain: Tensor | None = None
    square: Tensor | None = None
    statistics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    roles: tuple[str, ...] = ()

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
        roles = tuple(self.roles[i] for i in index.tolist()) if self.roles else ()
        return replace(self, **tensors, statistics=statistics, roles=roles)

    def scale(self) -> Tensor:
        """The largest magnitude of every site in float32, [sites]."""
        return self.maximum.float()

    def points(self, inside: int = INSIDE) -> tuple[Tensor, Tensor]:
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

    def errors(self) -> Tensor:
        """What a squared error of every atom weighs in the mean squared error of x, [sites, K]."""
        return self.weight if self.gain is None else self.weight * self.gain

    def gains(self, points: Tensor) -> Tensor | float:
        """The gain of all `points` or `signed_points`, [sites, K * 3] or [sites, 2 * K * 3]."""
        if self.gain is None:
            return 1.0
        signs = points.shape[1] // (self.gain.shape[1] * INSIDE)
        return self.gain.repeat_interleave(INSIDE, -1).repeat(1, signs)

    def quantile(self, share: float) -> Tensor:
        """The smallest magnitude that at least `share` of the values do not exceed, [sites]."""
        reached = self.weight.cumsum(-1) >= share * (1 - 1e-12)
        first = reached.int().argmax(-1, keepdim=True)
        return self.value.gather(-1, first).squeeze(-1)

    def power(self) -> Tensor:
        """Mean square of x at every site, [sites]."""
        if self.square is not None:
            return self.square
        return ((self.value**2 + self.spread**2) * self.errors()).sum(-1)


def cells(atoms: Atoms) -> tuple[Tensor, Tensor]:
    """The cells over which atoms of positive magnitude spread evenly: edges [sites, K + 1] and their
    weights [sites, K], which miss the weight at exactly zero.

    An atom's cell ends halfway to its neighbours, the last one's at the maximum, and the first one's
    is as wide below it as above, down to zero at most. Places without a positive atom come last, with
    weight and width 0. Valid for atoms that each stand for many values (those of a distribution):
    gaps between single drawn values are random, and their λ is noise.
    """
    positive = (atoms.weight > 0) & (atoms.value > 0)
    order = (~positive).int().argsort(dim=-1, stable=True)
    weight = torch.where(positive, atoms.weight, 0.0).gather(-1, order)
    maximum = atoms.maximum[:, None].double()
    value = torch.where(positive, atoms.value, maximum).gather(-1, order)
    between = torch.where(weight[:, 1:] > 0, (value[:, 1:] + value[:, :-1]) / 2, maximum)
    below = (2 * value[:, :1] - between[:, :1]).clamp(min=0)
    return torch.cat([below, between, maximum], -1), weight


def merge(
    count: Tensor,
    mean: Tensor,
    variance: Tensor,
    edges: Tensor,
    maximum: Tensor,
    size: int,
    negative: Tensor,
    gain: Tensor | None = None,
) -> Atoms:
    """Merge neighbouring bins [sites, M] into at most `size` atoms, keeping mean and variance.
    negative [sites, M] counts the negative values among `count`; gain [sites, M] sums up theirs.

    The highest bins stay single and the maximum is an atom by itself. Merging bins of equal
    p^(1/3) mass keeps the atoms' width where the optimal quantiser keeps its cells' (Bennett 1948).
    """
    width = edges.diff()
    mass = (count / width) ** (1 / 3) * width
    mass[:, 0] = 0
    high = count.gt(0).flip(-1).cumsum(-1).flip(-1) <= EXTREME_BINS  # the last filled bins
    mass = torch.where(high, 0.0, mass)
    total = mass.sum(-1, keepdim=True).clamp(min=1e-300)
    body = size - EXTREME_BINS - 3
    place = 1 + ((mass.cumsum(-1) - mass / 2) / total * body).long().clamp(max=body - 1)
    place[:, 0] = 0  # zeros are one atom
    tail = (count.gt(0) & high).cumsum(-1)
    place = torch.where(high, body + tail, place)
    summed = torch.zeros_like(count) if gain is None else gain
    merged = torch.zeros(5, len(count), size, dtype=torch.float64)
    terms = (count, count * mean, count * (variance + mean**2), negative, summed)
    for row, term in zip(merged, terms, strict=True):
        row.scatter_add_(-1, place, term)
    weight, first, second, below, gains = merged
    # One of the values in the highest bin is the maximum itself.
    last = _last(count)[:, None]
    top = place.gather(-1, last)
    mu, sigma2 = mean.gather(-1, last), variance.gather(-1, last)
    moments = (mu**0, mu, mu**2 + sigma2)
    for row, average, power in zip(merged[:3], moments, range(3), strict=True):
        row.scatter_add_(-1, top, -average)
        row[:, -1] += maximum**power
    for row, of in ((below, negative), (gains, summed)):
        share = of.gather(-1, last) / count.gather(-1, last)
        row.scatter_add_(-1, top, -share)
        row[:, -1:] += share
    some = weight.clamp(min=0.5)
    below, gains = below / some, gains / some
    value = torch.where(weight > 0.5, first / some, maximum[:, None])
    spread = (second / some - value**2).clamp(min=0).sqrt() * (weight > 0.5)
    value = torch.minimum(value, maximum[:, None])  # the mean of a bin may lie beyond its maximum
    spread[:, -1] = 0
    weight = torch.where(weight > 0.5, weight, 0.0)
    order = value.sort(-1)
    spread, weight, below, gains = (
        t.gather(-1, order.indices) for t in (spread, weight, below, gains)
    )
    weight = weight / weight.sum(-1, keepdim=True)
    atoms = Atoms(order.values, spread, weight, maximum, below.clamp(0, 1))
    return atoms if gain is None else replace(atoms, gain=gains.clamp(min=0))


def _last(count: Tensor) -> Tensor:
    """Index of the last non-empty bin of every site."""
    bins = torch.arange(count.shape[-1])
    return (count.gt(0) * bins).amax(-1)
