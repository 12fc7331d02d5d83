"""A bank of base-2 neurons over consecutive ranges of |x|, each with steps and an offset.

Neuron k codes |x| - floor_k on the width scale_k - floor_k with T_k steps; the smallest k whose range
holds |x| fires, else the last, which saturates. Parameters carry the site dimensions in front: scale
[*S, n] ascending; steps [*S, n] = 2^T_k (absent: `timesteps` everywhere); floor [*S, n] (absent: zero).
A neuron with a floor above zero spends one more spike on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.neurons.spikes import Params, Spikes, popcount


@dataclass(frozen=True)
class RangeSpikes(Spikes):
    """A spike train, train [T, *X] int8 in {-1, 0, 1}, and the spike for the floor, floor [*X] bool."""

    floor: Tensor

    @property
    def count(self) -> Tensor:
        return self.train.abs().sum(0) + self.floor


@dataclass(frozen=True)
class Bank:
    """The neurons of a bank, each tensor [*S, n]."""

    width: Tensor
    floor: Tensor
    steps: Tensor

    @classmethod
    def of(cls, p: Params, timesteps: int) -> Bank:
        scale = p["scale"]
        steps = p.get("steps", torch.full_like(scale, 2.0**timesteps))
        floor = p.get("floor", torch.zeros_like(scale))
        return cls(scale - floor, floor, steps)

    def limit(self) -> Tensor:
        """Where a neuron starts to saturate: half a step above its last level, [*S, n]."""
        return self.floor + self.width * (1 - 0.5 / self.steps)

    def gate(self, magnitude: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Width, floor, steps and number of the neuron of every value: magnitude [*S, K] -> [*S, K]."""
        last = self.width.shape[-1] - 1
        limit = self.limit()
        parts = [t[..., last, None] for t in (self.width, self.floor, self.steps)]
        grain = torch.full_like(magnitude, last)
        for k in range(last - 1, -1, -1):
            inside = magnitude < limit[..., k, None]
            neuron = (self.width, self.floor, self.steps)
            pairs = zip(neuron, parts, strict=True)
            parts = [torch.where(inside, t[..., k, None], rest) for t, rest in pairs]
            grain = torch.where(inside, float(k), grain)
        width, floor, steps = parts
        return width, floor, steps, grain


def threshold(steps: Tensor, t: int) -> Tensor:
    """theta(t) of signed digits in units of the width; infinite after the last step.

    Half a level above the largest number that the later steps reach without two spikes in a row,
    (floor(2^(T-t) 2/3) + 1/2) 2^-T: the digits are the non-adjacent form (Reitwiesner 1960).
    """
    place = steps * 2.0**-t
    return torch.where(place >= 1, (torch.floor(place * (2 / 3)) + 0.5) / steps, torch.inf)


def encode(x: Tensor, p: Params, timesteps: int, longest: int, signed: bool) -> RangeSpikes:
    """Run the chosen neuron of one site over `longest` steps; it stays silent after its last.

    Binary: v(1) = u + 2^-(T+1), s = [v >= 2^-t]. Signed: v(1) = u, s = [v >= theta(t)] -
    [v < -theta(t)]; halves round up in both.
    """
    magnitude = x.float().abs()
    width, floor, steps, grain = Bank.of(p, timesteps).gate(magnitude)
    v = (magnitude - floor) / width
    v = v.clamp(0, 1) if signed else v + 0.5 / steps
    train = []
    for t in range(1, longest + 1):
        if signed:
            theta = threshold(steps, t)
            spike = (v >= theta).to(v.dtype) - (v < -theta).to(v.dtype)
        else:
            spike = ((v >= 2.0**-t) & (steps * 2.0**-t >= 1)).to(v.dtype)
        v = v - spike * 2.0**-t
        train.append(spike.to(torch.int8))
    return RangeSpikes(x.sign().to(torch.int8), grain, torch.stack(train), floor > 0)


def table(p: Params, timesteps: int, longest: int) -> Tensor:
    """Magnitude of every code grain 2^longest + sum_t 2^(longest-t) s(t), [*S, n 2^longest] float32."""
    bank = Bank.of(p, timesteps)
    level = torch.arange(2**longest, device=bank.width.device) * 2.0**-longest
    return (level * bank.width[..., None] + bank.floor[..., None]).flatten(-2)


def quantise(x: Tensor, p: Params, timesteps: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Value (float32) and spikes of every x in one elementwise expression."""
    magnitude = x.float().abs()
    width, floor, steps, _ = Bank.of(p, timesteps).gate(magnitude)
    u = (magnitude - floor) / width
    if signed:
        place = u * steps  # steps are a power of two, so this and what follows is exact
        whole = torch.floor(place)
        code = whole + (place - whole >= 0.5).to(place.dtype)
    else:
        code = torch.floor((u + 0.5 / steps) * steps)
    code = torch.minimum(code.clamp(min=0), steps - 1)
    count = digits(code.float(), steps.float()) if signed else popcount(code)
    return torch.sign(x).float() * (code / steps * width + floor), count + (floor > 0)


def digits(code: Tensor, steps: Tensor) -> Tensor:
    """Spikes of the signed code of whole numbers 0 <= code < steps = 2^T, in closed form.

    Up to 2/3 of 2^T they are the non-zero digits of the non-adjacent form, the ones of code XOR
    3 code. A larger code starts with spikes of weight 1/2, 1/4, … that leave r = 2^T - code to the
    next power of two; the last of them leaves 2^K, the largest power of two below 3 r.
    """
    rest = steps - code
    power = (3 * rest).view(torch.int32) & 0x7F800000  # the exponent; 3 r is no power of two itself
    power = torch.minimum(power, steps.view(torch.int32))
    low = (power.view(torch.float32) - rest).to(torch.int32)
    leading = (steps.view(torch.int32) - power) >> 23
    return leading + popcount(low ^ (3 * low))
