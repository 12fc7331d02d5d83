"""The code of a neuron as a table: where its value changes from one float32 to the next, and to what.

A code is a staircase, so a value is coded by a search among its steps and one look-up, with the bits that
`Coding.quantise` gives. On few values that is a fraction of the operations of the expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stages.neurons.spikes import Params

MOST_CODES = 1 << 12  # of a table: with more the search for its steps is long
ROUNDS = 3
SAMPLES = 1024


class Quantiser(Protocol):
    """What a table is made of, see `stages.codings.base.Coding`."""

    tokenwise: bool
    neuron: bool

    def table(self, p: Params) -> Tensor: ...

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Lookup:
    """The steps of one site: edge [K] float32 ascending, the last float32 of every stair but the highest,
    and infinity; value and spikes [K + 1] of the stairs, of which the last is that of NaN."""

    edge: Tensor
    value: Tensor
    spikes: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value (float32) and stair of every x, whose spikes are `self.spikes[stair]`."""
        if x.device.type == "cpu":
            # torch would share out every 200 values, and its threads take ten times as long to meet.
            edge, value = self._arrays
            stair = edge.searchsorted(x.detach().float().numpy())
            return torch.from_numpy(value.take(stair)), torch.from_numpy(stair)
        stair = torch.bucketize(x.float().contiguous(), self.edge)
        return self.value.take(stair), stair

    @cached_property
    def _arrays(self) -> tuple[Any, Any]:
        return self.edge.numpy(), self.value.numpy()

    def to(self, device: torch.device) -> Lookup:
        return Lookup(self.edge.to(device), self.value.to(device), self.spikes.to(device))


def lookups(coding: Quantiser, sites: Sequence[Params]) -> list[Lookup | None]:
    """Tabulate the codes of sites with parameters of the same names and shapes; None for one that has
    stairs which samples between its levels do not show, and for all where codes depend on the token or
    are too many."""
    nothing: list[Lookup | None] = [None] * len(sites)
    if coding.tokenwise:
        return nothing
    p = {name: torch.stack([site[name] for site in sites]) for name in sites[0]}
    levels = coding.table(p)
    if levels.dim() != 2 or levels.shape[1] > MOST_CODES:
        return nothing
    keys = _start(levels)
    for _ in range(ROUNDS):
        tables = _tabulated(coding, p, keys)
        samples = _samples(tables, levels)
        wrong = _wrong(coding, p, tables, samples)
        if not bool(wrong.any()):
            return list(tables)
        keys = torch.cat([keys, torch.where(wrong, samples, 0)], 1).sort(1)[0]
    faulty = wrong.any(1).tolist()
    return [None if bad else table for bad, table in zip(faulty, tables, strict=True)]


def _start(levels: Tensor) -> Tensor:
    """Keys [S, K] of float32 values between which a stair begins at most once: levels [S, codes], what
    lies next to them and between two of them, and the ends."""
    level = levels.abs().sort(1)[0]
    middle = (level[:, 1:] + level[:, :-1]) / 2
    near = torch.cat([level * (1 - 2.0**-20), level, level * (1 + 2.0**-20), middle], 1)
    most = torch.finfo(torch.float32).max
    ends = torch.tensor([0.0, most], device=levels.device).expand(len(levels), 2)
    positive = _key(torch.cat([near, 2 * level[:, -1:], ends], 1).clamp(max=most))
    least = positive.new_tensor([1, -1]).expand(len(levels), 2)
    return torch.cat([positive, -positive, least], 1).sort(1)[0]


def _tabulated(coding: Quantiser, p: Params, keys: Tensor) -> list[Lookup]:
    """The stairs that keys [S, K] show, each of whose beginnings is searched among all float32 values."""
    value, spikes = _coded(coding, keys, p)
    begins = (value[:, 1:] != value[:, :-1]) | (spikes[:, 1:] != spikes[:, :-1])
    stairs = begins.byte().argsort(dim=1, descending=True, stable=True)
    stairs = stairs[:, : int(begins.sum(1).max())]  # of every site those that begin, and some more
    low, below, silent = (each.gather(1, stairs) for each in (keys, value, spikes))
    high, above, fired = (each.gather(1, stairs + 1) for each in (keys, value, spikes))
    # Most begin close to a level: columns that are searched to the end are left out one by one.
    while len(some := (high - low > 1).any(0).nonzero()[:, 0]):
        middle = (low[:, some] + high[:, some]) >> 1
        inside, now = _coded(coding, middle, p)
        same = (inside == below[:, some]) & (now == silent[:, some])
        low[:, some] = torch.where(same, middle, low[:, some])
        high[:, some] = torch.where(same, high[:, some], middle)
    edge, infinite = _number(low), value.new_tensor([torch.inf])
    return [
        Lookup(
            torch.cat([edge[site][:new], infinite]),
            torch.cat([value[site, :1], above[site][:new], infinite - infinite]),
            torch.cat([spikes[site, :1], fired[site][:new], spikes.new_zeros(1)]),
        )
        for site, new in enumerate(begins.sum(1).tolist())
    ]


def _coded(coding: Quantiser, keys: Tensor, p: Params) -> tuple[Tensor, Tensor]:
    """The codes of keys, without the spikes that a quantiser has none of."""
    value, spikes = coding.quantise(_number(keys), p)
    return value, spikes if coding.neuron else torch.zeros_like(value)


def _samples(tables: Sequence[Lookup], levels: Tensor) -> Tensor:
    """Keys [S, N] of all magnitudes, of those in the range of the levels, and next to every edge."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(2, SAMPLES, generator=generator).to(levels.device)
    top = levels.abs().amax(1, keepdim=True)
    sizes = _key(torch.cat([2 * top * drawn[0], top * torch.exp2(4 - 40 * drawn[1])], 1))
    edges = pad_sequence([_key(table.edge[:-1]) for table in tables], True)
    return torch.cat([sizes, -sizes, edges, edges + 1], 1)


def _wrong(coding: Quantiser, p: Params, tables: Sequence[Lookup], samples: Tensor) -> Tensor:
    """Which of the samples (keys [S, N]) the tables code otherwise than the coding."""
    value, spikes = _coded(coding, samples, p)
    rows = [table(row) for table, row in zip(tables, _number(samples), strict=True)]
    found = torch.stack([row[0] for row in rows])
    fired = torch.stack([t.spikes.take(row[1]) for t, row in zip(tables, rows, strict=True)])
    return (value != found) | (spikes != fired)


def _key(x: Tensor) -> Tensor:
    """Whole numbers int64 in the order of finite float32 values, one apart where those are neighbours."""
    bits = x.float().contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _number(keys: Tensor) -> Tensor:
    """The float32 values of keys."""
    magnitude = keys.abs().to(torch.int32).view(torch.float32)
    return torch.where(keys < 0, -magnitude, magnitude)
