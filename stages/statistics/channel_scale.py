"""The scales of channels, their means, and the distribution of a site's values in units of the ones about
the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.atoms import Atoms, merge
from stages.fits.statistics import ChannelMean, ChannelScale
from stages.model.experts import refuse_experts
from stages.model.sites import Site
from stages.neurons.channels import per_channel
from stages.ports.hooks import stream
from stages.sketch import CHUNK, Grid
from stages.statistics import measure
from stages.statistics.watch import Watch, padded

GRID = Grid(7)
ATOMS = 1024
SITES_AT_ONCE = 64


@measure.register
def channel_scale(
    statistic: ChannelScale, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
) -> dict[str, Tensor]:
    """scale [sites, C], filled up with 1, and channels [sites], their number; of x / s the atoms value,
    spread, weight, negative, gain [sites, K] and maximum [sites], see `Atoms`: gain is the mean s^2 of
    an atom's values.

    The atoms come from a histogram of 128 bins an octave, whose values are taken to lie evenly in their
    bins. They are zero at a site without channels.
    """
    scales = _scales(statistic, model, ids, sites, batch, {})
    sketches = {name: _Normalised(scale, None) for name, scale in scales.items()}
    stream(model, ids, batch, {n: Watch(s.see) for n, s in sketches.items()}, statistic.name)
    return _tensors(sites, sketches)


@measure.register
def channel_mean(
    statistic: ChannelMean, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
) -> dict[str, Tensor]:
    """mean [sites, C], filled up with 0, and of (x - m) / s what `channel_scale` has, with s = 1 and the
    atoms of centred sites alone where the statistic has no scale."""
    means = channel_means(model, ids, sites, batch, statistic.roles)
    if statistic.scale is None:
        sketches = {name: _Normalised(None, mean) for name, mean in means.items()}
    else:
        scales = _scales(statistic.scale, model, ids, sites, batch, means)
        sketches = {name: _Normalised(scale, means.get(name)) for name, scale in scales.items()}
    stream(model, ids, batch, {n: Watch(s.see) for n, s in sketches.items()}, statistic.name)
    return {"mean": padded([means.get(s.name) for s in sites], 0.0)} | _tensors(sites, sketches)


def channel_means(
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    batch: int,
    roles: tuple[str, ...],
) -> dict[str, Tensor]:
    """The means of the channels of every site of `roles` that is none of an expert, [C] each."""
    sums = {s.name: _Mean() for s in sites if s.role in roles and s.expert is None}
    stream(model, ids, batch, {n: Watch(m.see) for n, m in sums.items()}, "means of channels")
    return {name: each.mean() for name, each in sums.items()}


def _scales(
    statistic: ChannelScale,
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    batch: int,
    means: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The scales of the channels of every site that has some, of what lies about their means, [C] each."""
    refuse_experts(sites, "a scale of channels", "use coding.granularity=site")
    rank = ids.numel() - math.ceil(statistic.quantile * ids.numel() * (1 - 1e-12))
    having = [site.name for site in sites if site.port != "probs"]
    tops = {name: _Largest(rank + 1, means.get(name)) for name in having}
    stream(model, ids, batch, {n: Watch(t.see) for n, t in tops.items()}, "scales of channels")
    return {name: top.scale() for name, top in tops.items()}


def _tensors(sites: Sequence[Site], sketches: Mapping[str, _Normalised]) -> dict[str, Tensor]:
    """What a statistic says of all sites, those without a sketch among them."""
    rows = [sketches[site.name].scales() if site.name in sketches else None for site in sites]
    numbers = [0 if row is None else len(row) for row in rows]
    tensors = {"scale": padded(rows, 1.0), "channels": torch.tensor(numbers).float()}
    place = torch.tensor([row is not None for row in rows])
    having = list(sketches.values())
    starts = range(0, len(having), SITES_AT_ONCE)
    parts = [_atoms(having[i : i + SITES_AT_ONCE]) for i in starts]
    for name in ("value", "spread", "weight", "negative", "gain", "maximum"):
        joined = torch.cat([getattr(part, name) for part in parts])
        tensors[name] = joined.new_zeros(len(sites), *joined.shape[1:])
        tensors[name][place] = joined
    return tensors


def _rows(x: Tensor) -> Tensor:
    """A channel a column of x [B, S, C] or [B, H, S, D]."""
    return (x.transpose(1, 2).flatten(2) if x.dim() == 4 else x).flatten(0, 1)


class _Mean:
    """The mean of every channel so far."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None  # [C] float64
        self._number = 0

    def see(self, x: Tensor) -> None:
        """x [B, S, C] or [B, H, S, D]."""
        rows = _rows(x)
        total = rows.sum(0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._number += len(rows)

    def mean(self) -> Tensor:
        if self._sum is None:
            raise RuntimeError("a site was never reached by the forward pass")
        return (self._sum / self._number).float()


class _Largest:
    """The `number` largest magnitudes of every channel so far."""

    def __init__(self, number: int, mean: Tensor | None) -> None:
        self._number, self._mean = number, mean
        self._top: Tensor | None = None  # [number, C], descending

    def see(self, x: Tensor) -> None:
        """x [B, S, C] or [B, H, S, D]."""
        rows = _rows(x).float()
        rows = (rows if self._mean is None else rows - self._mean).abs()
        if self._top is not None:
            rows = torch.cat([self._top, rows])
        self._top = rows.topk(min(self._number, len(rows)), 0).values

    def scale(self) -> Tensor:
        """The last of them, or what takes its place where it is zero, [C]."""
        if self._top is None:
            raise RuntimeError("a site was never reached by the forward pass")
        scale = torch.where(self._top[-1] > 0, self._top[-1], self._top[0])
        rest = scale.amax() if bool(scale.amax() > 0) else scale.new_ones(())
        return torch.where(scale > 0, scale, rest)


class _Normalised:
    """The histogram of (x - m) / s: counts of signed bins, and the sum of s^2 of every magnitude's
    values."""

    def __init__(self, scale: Tensor | None, mean: Tensor | None) -> None:
        """Take scales and means [C], of which one may be None."""
        given = mean if scale is None else scale
        assert given is not None
        self._scale, self._mean, self._ones = scale, mean, torch.ones_like(given)
        size, device = GRID.magnitudes, given.device
        self.count = torch.zeros(2 * size, dtype=torch.int64, device=device)
        self._squares = torch.zeros(size, dtype=torch.float64, device=device)
        self.maximum = torch.zeros((), device=device)

    def scales(self) -> Tensor:
        """The scale of every channel, [C]."""
        return self._ones if self._scale is None else self._scale

    def gain(self) -> Tensor:
        """The sum of s^2 of the values of every magnitude."""
        return self.count.view(2, -1).sum(0).double() if self._scale is None else self._squares

    def see(self, x: Tensor) -> None:
        u = x.float() if self._mean is None else x.float() - per_channel(self._mean, x, 0.0)
        scale = None if self._scale is None else per_channel(self._scale, x, 1.0)
        flat = (u if scale is None else u / scale).flatten()
        for part in flat.split(CHUNK):
            self.count += torch.bincount(GRID.codes(part), minlength=len(self.count))
        if scale is not None:
            squares = scale.square().double().expand(x.shape).flatten()
            bins = len(self._squares)
            self._squares += torch.bincount(GRID.codes(flat) % bins, squares, minlength=bins)
        self.maximum = torch.maximum(self.maximum, flat.abs().amax())


def _atoms(sketches: Sequence[_Normalised]) -> Atoms:
    count = torch.stack([s.count.cpu() for s in sketches]).double()
    positive, negative = count.unflatten(-1, (2, -1)).unbind(1)
    edges = GRID.edges()
    middle, width = (edges[1:] + edges[:-1]) / 2, edges.diff()
    middle[0] = width[0] = 0.0  # zero, and what is as good as zero
    total = positive + negative
    maximum = torch.stack([s.maximum.cpu() for s in sketches]).double()
    gain = torch.stack([s.gain().cpu() for s in sketches])
    variance = (width**2 / 12).expand_as(total)
    return merge(total, middle.expand_as(total), variance, edges, maximum, ATOMS, negative, gain)
