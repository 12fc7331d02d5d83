"""The distribution of a site's values about the means of their channels, in units of their scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.atoms import Atoms, merge
from stages.fits.statistics import ChannelMean, ChannelScale, ChannelScales
from stages.model.shares import Part
from stages.model.sites import Site
from stages.neurons.channels import per_channel
from stages.sketch import CHUNK, Grid
from stages.statistics import Earlier, meter
from stages.statistics.streamed import Streamed
from stages.statistics.watch import Watch, means_of, padded, unpadded

GRID = Grid(7)
ATOMS = 1024
SITES_AT_ONCE = 64


@meter.register
def channel_scale(
    statistic: ChannelScale,
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    earlier: Earlier,
) -> Streamed:
    """scale [sites, C], filled up with 1, and channels [sites], their number; of x / s the atoms value,
    spread, weight, negative, gain [sites, K] and maximum [sites], see `Atoms`: gain is the mean s^2 of
    an atom's values.

    The atoms come from a histogram of 128 bins an octave, whose values are taken to lie evenly in their
    bins. They are zero at a site without channels.
    """
    scales = unpadded(earlier[ChannelScales.name], "scale")
    sketches = {i: _Normalised(s, None) for i, s in enumerate(scales) if s is not None}
    watches = {sites[i].name: Watch(sketch.see) for i, sketch in sketches.items()}

    def tensors() -> dict[str, Tensor]:
        return _tensors(len(sites), sketches)

    return Streamed(model, ids, statistic.name, watches, sketches, tensors)


@meter.register
def channel_mean(
    statistic: ChannelMean,
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    earlier: Earlier,
) -> Streamed:
    """mean [sites, C], filled up with 0, and of (x - m) / s what `channel_scale` has, with s = 1 and the
    atoms of centred sites alone where the statistic has no scale."""
    means = means_of(earlier, sites, statistic.roles)
    pairs: list[tuple[Tensor | None, Tensor | None]] = [(None, mean) for mean in means]
    if statistic.scale is not None:
        pairs = [*zip(unpadded(earlier[ChannelScales.name], "scale"), means, strict=True)]
    sketches = {
        i: _Normalised(scale, mean)
        for i, (scale, mean) in enumerate(pairs)
        if scale is not None or mean is not None
    }
    watches = {sites[i].name: Watch(sketch.see) for i, sketch in sketches.items()}

    def tensors() -> dict[str, Tensor]:
        return {"mean": padded(means, 0.0)} | _tensors(len(sites), sketches)

    return Streamed(model, ids, statistic.name, watches, sketches, tensors)


def _tensors(sites: int, sketches: Mapping[int, _Normalised]) -> dict[str, Tensor]:
    """What a statistic says of so many sites, those without a sketch among them."""
    rows = [sketches[i].scales() if i in sketches else None for i in range(sites)]
    numbers = [0 if row is None else len(row) for row in rows]
    tensors = {"scale": padded(rows, 1.0), "channels": torch.tensor(numbers).float()}
    having = list(sketches.values())
    starts = range(0, len(having), SITES_AT_ONCE)
    parts = [_atoms(having[i : i + SITES_AT_ONCE]) for i in starts]
    for name in ("value", "spread", "weight", "negative", "gain", "maximum"):
        joined = torch.cat([getattr(part, name) for part in parts])
        tensors[name] = joined.new_zeros(sites, *joined.shape[1:])
        tensors[name][[*sketches]] = joined
    return tensors


class _Histogram:
    """Counts of signed bins, the sum of s^2 of every magnitude's values, and the largest magnitude."""

    def __init__(self, device: torch.device) -> None:
        self.count = torch.zeros(2 * GRID.magnitudes, dtype=torch.int64, device=device)
        self.squares = torch.zeros(GRID.magnitudes, dtype=torch.float64, device=device)
        self.maximum = torch.zeros((), device=device)

    def add(self, u: Tensor, square: Tensor | None) -> None:
        """Add values u [...] and the s^2 of each, all 1 where none are given."""
        flat = u.flatten()
        for part in flat.split(CHUNK):
            self.count += torch.bincount(GRID.codes(part), minlength=len(self.count))
        if square is not None:
            bins = len(self.squares)
            squares = square.expand(u.shape).flatten()
            self.squares += torch.bincount(GRID.codes(flat) % bins, squares, minlength=bins)
        self.maximum = torch.maximum(self.maximum, flat.abs().amax())


class _Normalised:
    """The histogram of (x - m) / s."""

    def __init__(self, scale: Tensor | None, mean: Tensor | None) -> None:
        """Take scales and means [C], of which one may be None."""
        given = mean if scale is None else scale
        assert given is not None
        self._scale, self._mean, self._ones = scale, mean, torch.ones_like(given)
        self._passing: _Histogram | None = None
        self._all: _Histogram | None = None

    def scales(self) -> Tensor:
        """The scale of every channel, [C]."""
        return self._ones if self._scale is None else self._scale

    def see(self, x: Tensor) -> None:
        """x [B, S, C] or [B, H, S, D]."""
        u, square = x.float(), None
        if self._mean is not None:
            u = u - per_channel(self._mean.to(x.device), x, 0.0)
        if self._scale is not None:
            scale = per_channel(self._scale.to(x.device), x, 1.0)
            u, square = u / scale, scale.square().double()
        if self._passing is None:
            self._passing = _Histogram(x.device)
        self._passing.add(u, square)

    def take(self) -> Part:
        """Filled bins alone: their codes and counts, s^2 by magnitude where there are scales."""
        if self._passing is None:
            return {}
        seen, self._passing = self._passing, None
        code = seen.count.nonzero().squeeze(-1)
        part = {"code": code.int(), "count": seen.count[code], "maximum": seen.maximum}
        if self._scale is not None:
            magnitude = seen.squares.nonzero().squeeze(-1)
            part |= {"magnitude": magnitude.int(), "square": seen.squares[magnitude]}
        return part

    def merge(self, part: Part) -> None:
        if self._all is None:
            self._all = _Histogram(part["count"].device)
        self._all.count.index_add_(0, part["code"].long(), part["count"])
        self._all.maximum = torch.maximum(self._all.maximum, part["maximum"])
        if "square" in part:
            self._all.squares.index_add_(0, part["magnitude"].long(), part["square"])

    def histogram(self) -> tuple[Tensor, Tensor, Tensor]:
        """How often every signed bin was seen, the sum of s^2 by magnitude, the largest magnitude."""
        if self._all is None:
            raise RuntimeError("a site was never reached by the forward pass")
        count, squares = self._all.count, self._all.squares
        if self._scale is None:
            squares = count.view(2, -1).sum(0).double()
        return count.cpu(), squares.cpu(), self._all.maximum.cpu()


def _atoms(sketches: Sequence[_Normalised]) -> Atoms:
    counts, gains, maxima = zip(*(sketch.histogram() for sketch in sketches), strict=True)
    positive, negative = torch.stack(counts).double().unflatten(-1, (2, -1)).unbind(1)
    edges = GRID.edges()
    middle, width = (edges[1:] + edges[:-1]) / 2, edges.diff()
    middle[0] = width[0] = 0.0  # zero, and what is as good as zero
    total = positive + negative
    maximum, gain = torch.stack(maxima).double(), torch.stack(gains)
    variance = (width**2 / 12).expand_as(total)
    return merge(total, middle.expand_as(total), variance, edges, maximum, ATOMS, negative, gain)
