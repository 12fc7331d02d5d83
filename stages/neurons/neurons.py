"""The two neuron families behind the codings, and the quantiser that bounds them.

Conventions, the same for all: the neuron works on the normalised magnitude u = |x| / scale, fires at
v >= theta, sign(0) = 0, and one v0 serves fitting and evaluation. Parameters carry the site dimensions
in front: `scale` [*S], steps [*S, T], grains [*S, n]; values x are [*S, K] for a batch of sites or any
shape for a single one (*S empty). `encode` is the time-stepped neuron and the definition; `quantise`
is one pass of elementwise operations that gives the same code and count.
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


# --- one neuron with free step weights: phase, multigrain, free steps ----------------------------


def fixed_steps(scale: Tensor, step: Tensor, v0: float) -> dict[str, Tensor]:
    """Parameters of neurons whose output, reset and threshold weights are one given step [T] at every
    site: scale [sites]."""
    weights = {name: step.repeat(len(scale), 1) for name in ("d", "h", "theta")}
    return {"scale": scale, "v0": torch.full_like(scale, v0)} | weights


def step_encode(x: Tensor, p: Params, max_spikes: int | None = None) -> Spikes:
    """Runs v(1) = u + v0; s = [v >= theta(t)]; v -= h(t) s over the T steps of one site.

    p: scale [], v0 [], d, h, theta [T]. After `max_spikes` spikes the neuron stays silent.
    """
    v = x.float().abs() / p["scale"] + p["v0"]
    fired = torch.zeros_like(v, dtype=torch.long)
    train = []
    for h, theta in zip(p["h"], p["theta"], strict=True):
        spike = v >= theta
        if max_spikes is not None:
            spike = spike & (fired < max_spikes)
        v = torch.where(spike, v - h, v)
        fired = fired + spike
        train.append(spike)
    return Spikes(x.sign().to(torch.int8), torch.zeros_like(fired), torch.stack(train))


def step_table(p: Params) -> Tensor:
    """Magnitude of every code, [*S, 2^T] float32: scale * sum_t d(t) s(t), summed in step order."""
    bits = code_bits(p["d"].shape[-1]).to(p["d"].device)
    level = torch.zeros(*p["d"].shape[:-1], len(bits), device=bits.device)
    for t in range(bits.shape[1]):
        level = level + bits[:, t] * p["d"][..., t, None]
    return level * p["scale"][..., None]


def step_quantise(x: Tensor, p: Params, max_spikes: int | None = None) -> tuple[Tensor, Tensor]:
    """Value (float32) and spike count of every x in one elementwise expression, T steps unrolled."""
    scale = p["scale"][..., None]
    v = x.float().abs() / scale + p["v0"][..., None]
    y, count = torch.zeros_like(v), torch.zeros_like(v)
    for t in range(p["d"].shape[-1]):
        spike = (v >= p["theta"][..., t, None]).to(v.dtype)
        if max_spikes is not None:
            spike = spike * (count < max_spikes)
        v = v - spike * p["h"][..., t, None]
        y = y + spike * p["d"][..., t, None]
        count = count + spike
    return torch.sign(x).float() * (y * scale), count


# --- a bank of base-2 neurons with nested ranges: las, gated --------------------------------------


def bank_encode(x: Tensor, p: Params, timesteps: int, v0: float) -> Spikes:
    """The smallest neuron k with |x| < scale_k (1 - v0) fires, else the last, which saturates.

    p: scale [n], ascending. The chosen neuron runs base 2: d(t) = h(t) = theta(t) = 2^-t.
    """
    magnitude = x.float().abs()
    limits = (p["scale"] * (1 - v0))[:-1]
    grain = (magnitude[..., None] >= limits).sum(-1)
    v = magnitude / p["scale"][grain] + v0
    train = []
    for t in range(1, timesteps + 1):
        spike = v >= 2.0**-t
        v = torch.where(spike, v - 2.0**-t, v)
        train.append(spike)
    return Spikes(x.sign().to(torch.int8), grain, torch.stack(train))


def bank_table(p: Params, timesteps: int) -> Tensor:
    """Magnitude of every code, [*S, n * 2^T] float32."""
    level = torch.arange(2**timesteps, device=p["scale"].device) * 2.0**-timesteps
    return (level * p["scale"][..., None]).flatten(-2)


def bank_quantise(x: Tensor, p: Params, timesteps: int, v0: float) -> tuple[Tensor, Tensor]:
    """Closed form of `bank_encode`: floor((u + v0) 2^T), clamped; the count is its population count.

    Exact: u + v0 < 2 is rounded once, in both forms, and every later operation is exact.
    """
    magnitude = x.float().abs()
    grains = p["scale"].shape[-1]
    scale = p["scale"][..., grains - 1, None]
    for k in range(grains - 2, -1, -1):
        candidate = p["scale"][..., k, None]
        scale = torch.where(magnitude < candidate * (1 - v0), candidate, scale)
    steps = 2.0**timesteps
    code = torch.clamp(torch.floor((magnitude / scale + v0) * steps), max=steps - 1)
    return torch.sign(x).float() * (code * (1 / steps) * scale), popcount(code)


def popcount(code: Tensor) -> Tensor:
    """Number of one bits of non-negative whole float32 values below 2^24, as float32."""
    bits = code.to(torch.int32)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(torch.float32)


# --- a free scalar quantiser: the bounds -------------------------------------------------------------


def table_quantise(x: Tensor, p: Params) -> Tensor:
    """Nearest level, sign kept: thresholds [*S, L-1] ascending, levels [*S, L] ascending."""
    magnitude = x.float().abs()
    if p["levels"].dim() == 1:
        index = torch.bucketize(magnitude, p["thresholds"], right=True)
        level = p["levels"][index]
    else:
        index = torch.searchsorted(p["thresholds"], magnitude, right=True)
        level = torch.gather(p["levels"], -1, index)
    return torch.sign(x).float() * level
