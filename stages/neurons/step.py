"""One neuron whose step weights are free: rate, phase, multigrain, free steps, two spikes."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.neurons.spikes import Params, Spikes, code_bits


def fixed_steps(scale: Tensor, step: Tensor, v0: float) -> dict[str, Tensor]:
    """Parameters of neurons whose output, reset and threshold weights are one given step [T] at every
    site: scale [sites]."""
    weights = {name: step.repeat(len(scale), 1) for name in ("d", "h", "theta")}
    return {"scale": scale, "v0": torch.full_like(scale, v0)} | weights


def step_encode(x: Tensor, p: Params, max_spikes: int | None = None) -> Spikes:
    """Run v(1) = u + v0; s = [v >= theta(t)]; v -= h(t) s over the T steps of one site.

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
