"""A bank of base-2 neurons with nested ranges and T steps each: las, oat."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.neurons.spikes import Params, Spikes, popcount


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
