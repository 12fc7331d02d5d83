"""The sketch of a site: a histogram over floating-point bit patterns that misses no value.

A bin is one sign, one binade and one value of the leading mantissa bits, so it needs no range, merges
by addition and holds every outlier. Beside the integer count a bin keeps the first two moments of the
position r in [0, 1) inside the bin, to an eighth of it, from counts of finer bins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.compiler import fused
from stages.counting import counted
from stages.errors import InputError

LOWEST_EXPONENT = -40
HIGHEST_EXPONENT = 24
CHUNK = 1 << 22
SUB_BITS = 3
MOST_BITS = 13
_MANTISSA = 23
_BIAS = 127
# By mantissa bits: how far a bit pattern is shifted, the bin it then starts from, and the number of bins.
# Looked up, they are constants of a compiled kernel, which no symbolic shift would be on a GPU.
_PLACES = tuple(
    (
        _MANTISSA - bits,
        ((LOWEST_EXPONENT + _BIAS) << bits) - 1,
        ((HIGHEST_EXPONENT - LOWEST_EXPONENT) << bits) + 2,
    )
    for bits in range(MOST_BITS + 1)
)


@dataclass(frozen=True)
class Grid:
    """The bins: magnitudes below 2^-40 share bin 0, those from 2^24 on (and inf, nan) the last."""

    mantissa_bits: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.mantissa_bits <= MOST_BITS:
            raise InputError(
                f"a grid of {self.mantissa_bits} mantissa bits: give a whole number from 1 to {MOST_BITS}"
            )

    @property
    def magnitudes(self) -> int:
        """Number of magnitude bins, underflow and overflow included."""
        return _PLACES[self.mantissa_bits][2]

    def codes(self, x: Tensor) -> Tensor:
        """Return the bin of every value of flat float32 x (int32), negative ones after `magnitudes`."""
        shift, base, magnitudes = _PLACES[self.mantissa_bits]
        bits = x.view(torch.int32)
        magnitude = bits & 0x7FFFFFFF
        code = torch.clamp((magnitude >> shift) - base, 0, magnitudes - 1)
        return code + ((bits >> 31) & magnitudes)

    def edges(self) -> Tensor:
        """Return the lower edges of the bins and the end of the last, [magnitudes + 1] float64."""
        steps = torch.arange(self.magnitudes - 1, dtype=torch.float64)
        size = 2**self.mantissa_bits
        regular = 2.0 ** (LOWEST_EXPONENT + torch.floor(steps / size)) * (1 + steps % size / size)
        return torch.cat([torch.zeros(1, dtype=torch.float64), regular, regular[-1:] * 2])


class Accumulator:
    """Grows the sketch of one site on its device.

    It counts in sub-bins, 2^SUB_BITS a bin, and nothing else: one pass of integer counting is all a
    value costs, and where a value lies inside its bin is known to a sub-bin. `exact` says that values
    carry no mantissa beyond the grid (bfloat16), so that there is nothing inside a bin. `sparse` keeps
    the filled bins alone between two calls, for sites that are thousands.
    """

    def __init__(
        self, grid: Grid, channels: int, exact: bool, device: torch.device, sparse: bool = False
    ) -> None:
        self.grid = grid
        self.sub_bits = 0 if exact else SUB_BITS
        self.fine = Grid(grid.mantissa_bits + self.sub_bits)
        size = 0 if sparse else 2 * self.fine.magnitudes
        self.count = torch.zeros(size, dtype=torch.int64, device=device)
        self.filled = torch.empty(0, dtype=torch.int32, device=device) if sparse else None
        self._bins: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        # Compiled code writes float32, whatever torch's default is.
        ends = [float("inf"), float("-inf")]
        self.range = torch.tensor(ends, dtype=torch.float32, device=device)
        self.absmax = torch.zeros(channels, dtype=torch.float32, device=device)
        self._square, self._passing = torch.zeros(2, channels, dtype=torch.float64, device=device)

    @property
    def square(self) -> Tensor:
        """Sums of x^2 of every channel, [C] float64."""
        return self._square + self._passing

    def close(self) -> None:
        """End a batch: its squares, added up by themselves, are one term of those of all batches."""
        self._square += self._passing
        self._passing.zero_()

    def add(self, x: Tensor, surplus_zeros: Tensor | int = 0) -> None:
        """Add x [..., C]; `surplus_zeros` of its zeros are masked entries and are taken off again."""
        x = x.float()
        count, wide = self._dense(), x.shape[-1] if len(self.absmax) else x.numel()
        rows, place = x.reshape(-1, wide).contiguous(), _PLACES[self.fine.mantissa_bits]
        sums = (count, self.range, self.absmax, self._passing)
        if not counted(rows, place, surplus_zeros, *sums):
            self._summed(rows, surplus_zeros)
            for chunk in rows.view(-1).split(CHUNK):
                count += torch.bincount(_codes(self.fine, chunk), minlength=len(count))
            count[0] -= surplus_zeros
        self._keep(count)

    def _summed(self, rows: Tensor, surplus_zeros: Tensor | int) -> None:
        """Add what is no count of rows [N, C], or [1, N] without channels."""
        if len(self.absmax):
            low, high, square = _channels(rows)
            self.absmax = torch.maximum(self.absmax, torch.maximum(high, -low))
            self._passing += square
        else:
            low, high = _ends(rows, torch.as_tensor(surplus_zeros, device=rows.device))
        self.range[0] = torch.minimum(self.range[0], low.amin())
        self.range[1] = torch.maximum(self.range[1], high.amax())

    def _keep(self, count: Tensor) -> None:
        """Store the count of every bin, of the sparse form the filled ones alone."""
        if self.filled is not None:
            self.filled = count.nonzero().squeeze(-1).int()
            count = count[self.filled]
            count = count.int() if int(count.max()) < 2**31 else count
        self.count = count

    def part(self) -> dict[str, Tensor]:
        """Return what one batch has left, on the CPU: filled sub-bins, counts, range, channels."""
        dense = self._dense()
        code = dense.nonzero().squeeze(-1)
        part = {"code": code.int(), "count": dense[code], "range": self.range}
        if len(self.absmax):
            part |= {"absmax": self.absmax, "square": self.square}
        return {name: value.cpu() for name, value in part.items()}

    def merge(self, part: Mapping[str, Tensor]) -> None:
        """Add the `part` of a batch; of all in their order the sketch is that of one pass."""
        self._keep(self._dense().index_add_(0, part["code"].long(), part["count"]))
        low, high = part["range"]
        self.range = torch.stack([self.range[0].minimum(low), self.range[1].maximum(high)])
        if len(self.absmax):
            self.absmax = torch.maximum(self.absmax, part["absmax"])
            self._square += part["square"]

    def _dense(self) -> Tensor:
        """The count of every bin, which the sparse form spreads out."""
        if self.filled is None:
            return self.count
        size = 2 * self.fine.magnitudes
        count = torch.zeros(size, dtype=torch.int64, device=self.count.device)
        return count.index_add_(0, self.filled, self.count.long())

    def finish(self) -> None:
        """Keep the filled bins alone: nothing can be added any more."""
        self._bins = self.bins()
        self.count = self.count.new_empty(0)
        self.filled = None

    def bins(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the filled bins: code int32, count int64, sums of r and r^2 float64.

        A sub-bin's values stand evenly inside it.
        """
        if self._bins is not None:
            return self._bins
        dense = self._dense()
        filled = dense.nonzero().squeeze(-1)
        # On the CPU, which adds up in order: the same bits on every device.
        count, filled = dense[filled].cpu(), filled.cpu()
        sign = (filled >= self.fine.magnitudes).long()
        index = filled - sign * self.fine.magnitudes
        inner = (index - 1) & (2**self.sub_bits - 1)
        last = self.grid.magnitudes - 1
        coarse = torch.where(index > 0, 1 + ((index - 1) >> self.sub_bits), 0).clamp(max=last)
        ascending = sign * self.grid.magnitudes + coarse
        codes, place = ascending.unique_consecutive(return_inverse=True)
        half = 0.5 if self.sub_bits else 0.0
        position = (inner + half).double() * 2.0**-self.sub_bits
        spread = 4.0**-self.sub_bits / 12 if self.sub_bits else 0.0
        terms = (count, count * position, count * (position**2 + spread))
        sums = (t.new_zeros(len(codes)).index_add_(0, place, t) for t in terms)
        total, first, second = sums
        return codes.int(), total, first, second


def _channel_sums(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return rows.amin(0), rows.amax(0), rows.square().sum(0)


def _lowest_and_highest(x: Tensor, surplus_zeros: Tensor) -> tuple[Tensor, Tensor]:
    zero = x == 0
    least = torch.where(zero, torch.inf, x).amin()
    return torch.where(zero.sum() > surplus_zeros, x.amin(), least), x.amax()


_channels = fused(_channel_sums)
_ends = fused(_lowest_and_highest)
_codes = fused(Grid.codes)


@dataclass(frozen=True)
class SketchSet:
    """The sketches of all sites, sparse: the bins of site i are [offsets[i], offsets[i + 1]).

    code int32, count int64, first and second (sums of r and r^2) float64; range [sites, 2];
    the channels of site i are [channel_offsets[i], channel_offsets[i + 1]) of absmax and square.
    `unreached` are sites that no value passed, of experts that no token was routed to.
    """

    sites: tuple[str, ...]
    roles: tuple[str, ...]
    layers: tuple[int, ...]
    grid: Grid
    tensors: dict[str, Tensor]
    unreached: tuple[str, ...] = ()

    @classmethod
    def collect(
        cls, named: Sequence[tuple[str, str, int]], grid: Grid, accumulators: Sequence[Accumulator]
    ) -> SketchSet:
        """Gather the non-empty bins of every accumulator; named holds (site, role, layer)."""
        bins = ([part.cpu() for part in a.bins()] for a in accumulators)  # of several devices
        code, count, first, second = zip(*bins, strict=True)
        tensors = {
            "offsets": _offsets([len(c) for c in code]),
            "code": torch.cat(code),
            "count": torch.cat(count),
            "first": torch.cat(first),
            "second": torch.cat(second),
            "range": torch.stack([a.range.cpu() for a in accumulators]),
            "channel_offsets": _offsets([len(a.absmax) for a in accumulators]),
            "absmax": torch.cat([a.absmax.cpu() for a in accumulators]),
            "square": torch.cat([a.square.cpu() for a in accumulators]),
        }
        names, roles, layers = zip(*named, strict=True)
        return cls(tuple(names), tuple(roles), tuple(layers), grid, tensors)

    def split(self, size: int) -> Iterator[SketchSet]:
        """Yield sets of `size` sites in turn, the last of what is left."""
        t = self.tensors
        for start in range(0, len(self.sites), size):
            part = slice(start, start + size)
            bins, channels = (
                t[name][start : start + size + 1] for name in ("offsets", "channel_offsets")
            )
            filled, wide = (slice(int(each[0]), int(each[-1])) for each in (bins, channels))
            tensors = {name: t[name][filled] for name in ("code", "count", "first", "second")}
            tensors |= {name: t[name][wide] for name in ("absmax", "square")}
            tensors |= {"offsets": bins - bins[0], "channel_offsets": channels - channels[0]}
            tensors["range"] = t["range"][part]
            yield SketchSet(
                self.sites[part], self.roles[part], self.layers[part], self.grid, tensors
            )

    def check_finite(self) -> None:
        """Raise InputError naming the first site with values that are not finite or not below 2^24."""
        last = self.grid.magnitudes - 1
        over = (self.tensors["code"] % self.grid.magnitudes) == last
        if bool(over.any()):
            index = int(over.nonzero()[0])
            site = int(torch.searchsorted(self.tensors["offsets"], index, right=True)) - 1
            raise InputError(
                f"site {self.sites[site]} holds {int(self.tensors['count'][over].sum())} values that "
                f"are nan, inf or beyond 2^{HIGHEST_EXPONENT}; check the model and its dtype "
                "(float16 overflows: use model.dtype=bfloat16 or float32)"
            )

    def magnitudes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the counts, means and variances of |x| and counts of negative x per magnitude bin, dense
        [sites, magnitudes] float64."""
        t, bins = self.tensors, self.grid.magnitudes
        site = torch.repeat_interleave(
            torch.arange(len(self.sites)), t["offsets"].diff(), output_size=len(t["code"])
        )
        flat = site * bins + t["code"].long() % bins
        size = len(self.sites) * bins
        sums = torch.zeros(4, size, dtype=torch.float64)
        below = t["count"] * (t["code"] >= bins)
        terms = (t["count"], t["first"], t["second"], below)
        for row, term in zip(sums, terms, strict=True):
            row.index_add_(0, flat, term.double())
        count, first, second, negative = sums.view(4, len(self.sites), bins)
        edges = self.grid.edges()
        some = count.clamp(min=1)
        position = first / some
        width = edges.diff()
        mean = edges[:-1] + width * position
        variance = width**2 * (second / some - position**2).clamp(min=0)
        # Bin 0 is zero and what is below 2^-40: its mantissa remainders mean nothing.
        mean[:, 0], variance[:, 0] = 0.0, 0.0
        return count, mean, variance, negative

    def signed_moments(self) -> Tensor:
        """Return count, sum, and central second and fourth moments of x per site, [sites, 4] float64."""
        t, bins = self.tensors, self.grid.magnitudes
        edges = self.grid.edges()
        code = t["code"].long()
        index, sign = code % bins, torch.where(code < bins, 1.0, -1.0).double()
        position = t["first"] / t["count"]
        value = sign * torch.where(index == 0, 0.0, edges[index] + edges.diff()[index] * position)
        out = []
        for a, b in zip(t["offsets"][:-1].tolist(), t["offsets"][1:].tolist(), strict=True):
            count, x = t["count"][a:b].double(), value[a:b]
            mean = (count * x).sum() / count.sum()
            central = [(count * (x - mean) ** k).sum() / count.sum() for k in (2, 4)]
            out.append(torch.stack([count.sum(), mean, *central]))
        return torch.stack(out)

    def save(self, folder: Path) -> None:
        save_file(self.tensors, folder / "sketch.safetensors")
        meta = {
            "sites": self.sites,
            "roles": self.roles,
            "layers": self.layers,
            "mantissa_bits": self.grid.mantissa_bits,
            "unreached": self.unreached,
        }
        (folder / "sketch.json").write_text(json.dumps(meta))

    @classmethod
    def load(cls, folder: Path) -> SketchSet:
        meta = json.loads((folder / "sketch.json").read_text())
        return cls(
            tuple(meta["sites"]),
            tuple(meta["roles"]),
            tuple(meta["layers"]),
            Grid(meta["mantissa_bits"]),
            load_file(folder / "sketch.safetensors"),
            tuple(meta["unreached"]),
        )


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)
