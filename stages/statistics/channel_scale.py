"""The scales of channels, and the distribution of a site's values in units of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.atoms import Atoms, merge
from stages.fits.statistics import ChannelScale
from stages.model.experts import refuse_experts
from stages.model.sites import Site
from stages.neurons.channels import per_channel
from stages.ports.hooks import stream
from stages.sketch import Grid
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
    refuse_experts(sites, "a scale of channels", "use coding.granularity=site")
    having = [site.name for site in sites if site.port != "probs"]
    rank = ids.numel() - math.ceil(statistic.quantile * ids.numel() * (1 - 1e-12))
    tops = {name: _Largest(rank + 1) for name in having}
    stream(model, ids, batch, {n: Watch(t.see) for n, t in tops.items()}, "scales of channels")
    scales = {name: top.scale() for name, top in tops.items()}
    sketches = {name: _Normalised(scale) for name, scale in scales.items()}
    stream(model, ids, batch, {n: Watch(s.see) for n, s in sketches.items()}, statistic.name)
    rows = [scales.get(site.name) for site in sites]
    numbers = [0 if row is None else len(row) for row in rows]
    tensors = {"scale": padded(rows, 1.0), "channels": torch.tensor(numbers).float()}
    place = torch.tensor([row is not None for row in rows])
    starts = range(0, len(having), SITES_AT_ONCE)
    parts = [_atoms([sketches[n] for n in having[i : i + SITES_AT_ONCE]]) for i in starts]
    for name in ("value", "spread", "weight", "negative", "gain", "maximum"):
        joined = torch.cat([getattr(part, name) for part in parts])
        tensors[name] = joined.new_zeros(len(sites), *joined.shape[1:])
        tensors[name][place] = joined
    return tensors


class _Largest:
    """The `number` largest magnitudes of every channel so far."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._top: Tensor | None = None  # [number, C], descending

    def see(self, x: Tensor) -> None:
        """x [B, S, C] or [B, H, S, D]."""
        rows = x.transpose(1, 2).flatten(2) if x.dim() == 4 else x
        rows = rows.flatten(0, 1).abs().float()
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
    """The histogram of x / s: counts of signed bins, and the sum of s^2 of every magnitude's values."""

    def __init__(self, scale: Tensor) -> None:
        size = GRID.magnitudes
        self._scale = scale
        self.count = torch.zeros(2 * size, dtype=torch.int64, device=scale.device)
        self.gain = torch.zeros(size, dtype=torch.float64, device=scale.device)
        self.maximum = torch.zeros((), device=scale.device)

    def see(self, x: Tensor) -> None:
        scale = per_channel(self._scale, x, 1.0)
        u = x.float() / scale
        codes = GRID.codes(u.flatten())
        self.count += torch.bincount(codes, minlength=len(self.count))
        squares = scale.square().double().expand(x.shape).flatten()
        bins = len(self.gain)
        self.gain += torch.bincount(codes % bins, squares, minlength=bins)
        self.maximum = torch.maximum(self.maximum, u.abs().amax())


def _atoms(sketches: Sequence[_Normalised]) -> Atoms:
    count = torch.stack([s.count for s in sketches]).cpu().double()
    positive, negative = count.unflatten(-1, (2, -1)).unbind(1)
    edges = GRID.edges()
    middle, width = (edges[1:] + edges[:-1]) / 2, edges.diff()
    middle[0] = width[0] = 0.0  # zero, and what is as good as zero
    total = positive + negative
    maximum = torch.stack([s.maximum for s in sketches]).cpu().double()
    gain = torch.stack([s.gain for s in sketches]).cpu()
    variance = (width**2 / 12).expand_as(total)
    return merge(total, middle.expand_as(total), variance, edges, maximum, ATOMS, negative, gain)
