"""One spike in time: levels whose gaps are powers of two of one step, sent as the slot of a spike.

Levels are whole multiples of a step delta. They lie in segments of equal gaps, which double or stay from
zero outwards: so many levels of segment g, the last of which is `end_g`, lie `gap_g` apart, and the first
lies `gap_g` beyond `base_g`, the last level of the segment below. A magnitude below the first threshold is
silent. Parameters carry the site dimensions in front: scale [*S] = delta; start, base, gap, end [*S, G]
in units of delta, where start_g is the smallest magnitude of segment g and start_0 the silent zone's end;
a place without a segment repeats the last one with an infinite start.

Decoding: A(t) counts what has arrived in a neuron's window, and out += A(t) 2^e(t) with the gap 2^e(t)
below the level of slot t sums a level up out of its gaps: an addition a slot, whatever the levels are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.neurons.spikes import Params


def quantise(x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
    """Value (float32) and spikes, 0 or 1, of every x in one elementwise expression."""
    u = x.float().abs() / p["scale"][..., None]
    fires = u >= p["start"][..., 0, None]
    base, gap, end = (p[name][..., 0, None] for name in ("base", "gap", "end"))
    for g in range(1, p["start"].shape[-1]):
        inside = u >= p["start"][..., g, None]
        base = torch.where(inside, p["base"][..., g, None], base)
        gap = torch.where(inside, p["gap"][..., g, None], gap)
        end = torch.where(inside, p["end"][..., g, None], end)
    # Exact: base is a whole number of steps not above u, gap a power of two.
    place = (u - base) / gap
    whole = torch.floor(place)
    level = base + torch.clamp(whole + (place - whole >= 0.5).to(place.dtype), min=1) * gap
    value = torch.minimum(level, end) * p["scale"][..., None]
    return torch.where(fires, torch.sign(x).float() * value, 0.0), fires.to(value.dtype)


def levels(p: Params) -> Tensor:
    """All levels of one site in units of delta, [K] ascending."""
    parts = []
    for start, base, gap, end in zip(*(p[n] for n in ("start", "base", "gap", "end")), strict=True):
        if bool(torch.isfinite(start)):
            number = int(((end - base) / gap).round())
            parts.append(base + gap * torch.arange(1, number + 1, device=gap.device))
    return torch.cat(parts)


def thresholds(p: Params) -> Tensor:
    """The smallest magnitude of every level of one site in units of delta, [K] ascending."""
    every = levels(p)
    middle = (every[1:] + every[:-1]) / 2  # whole or half numbers of steps
    return torch.cat([p["start"][:1], torch.maximum(middle, p["start"][0])])
