"""Spike trains, their integer codes and the values that these stand for.

Conventions of every neuron: it works on the normalised magnitude u = |x| / scale, fires at v >= theta,
sign(0) = 0, and one v0 serves fitting and evaluation. Parameters carry the site dimensions in front:
`scale` [*S], steps [*S, T], grains [*S, n]; values x are [*S, K] for a batch of sites or any shape for
a single one (*S empty). `encode` is the time-stepped neuron and the definition; `quantise` is one pass
of elementwise operations that gives the same code and count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Spikes:
    """A spike train: sign [*X] in {-1, 0, 1}, grain [*X] (which neuron fires), train [T, *X] bool."""

    sign: Tensor
    grain: Tensor
    train: Tensor

    @property
    def code(self) -> Tensor:
        """The integer code grain * 2^T + sum_t 2^(T-t) s(t), shape [*X]."""
        code = self.grain.long()
        for spikes in self.train:
            code = 2 * code + spikes.long()
        return code

    @property
    def count(self) -> Tensor:
        """Spikes per value, shape [*X]."""
        return self.train.sum(0)


@dataclass(frozen=True)
class Counts(Spikes):
    """A spike train whose steps weigh the same, so that its code is the number of its spikes."""

    @property
    def code(self) -> Tensor:
        return self.train.sum(0)


@dataclass(frozen=True)
class SpikeTime:
    """A train of at most one spike in a window too long for bits: sign [*X] in {-1, 0, 1} and time
    [*X], counted from 0; the time `timesteps` is silence."""

    sign: Tensor
    time: Tensor
    timesteps: int

    @property
    def code(self) -> Tensor:
        """The integer code, which is the time, shape [*X]."""
        return self.time.long()

    @property
    def count(self) -> Tensor:
        """Spikes per value, 0 or 1, shape [*X]."""
        return (self.time < self.timesteps).long()


def decode(spikes: Spikes | SpikeTime, table: Tensor) -> Tensor:
    """Values of a spike train: one lookup of its code in `table` [codes] float32, times the sign."""
    return spikes.sign.to(table.dtype) * table[spikes.code]


def code_bits(timesteps: int) -> Tensor:
    """The trains of all 2^T codes, [2^T, T], the first step the most significant."""
    shifts = torch.arange(timesteps - 1, -1, -1)
    return ((torch.arange(2**timesteps)[:, None] >> shifts) & 1).float()


def popcount(code: Tensor) -> Tensor:
    """Number of one bits of non-negative whole float32 values below 2^24, as float32."""
    bits = code.to(torch.int32)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(torch.float32)
