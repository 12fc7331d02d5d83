"""One spike in time on free levels, sent as the slot of a spike, each slot with a weight of its own.

Parameters carry the site dimensions in front: levels [*S, L + 1] ascending, the first of them zero, which
is silence, and the last one repeated; thresholds [*S, L], the smallest magnitude of every level, infinite
where there is none. Where there are more levels than a window has slots, neurons share them as in
`stages.neurons.slots`. Decoding: what arrives in a slot is multiplied by its level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.neurons.decoding import Decoding
from stages.neurons.slots import FreeWindow, SlotSpikes, falling
from stages.neurons.spikes import Params


def quantise(x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
    """Value (float32) and spikes, 0 or 1, of every x: a search among the thresholds, log2 L steps a
    value, and a look-up: of 128 levels, compiled, on one core 27 ns, and `slots.quantise` 2.7."""
    magnitude = x.float().abs()
    if p["levels"].dim() == 1:
        index = torch.bucketize(magnitude, p["thresholds"], right=True)
        level = p["levels"][index]
    else:
        index = torch.searchsorted(p["thresholds"].contiguous(), magnitude.contiguous(), right=True)
        level = p["levels"].gather(-1, index)
    level = torch.where(magnitude.isnan(), magnitude, level)
    return torch.sign(x).float() * level, (index > 0).to(level.dtype)


def encode(x: Tensor, p: Params, slots: int) -> SlotSpikes:
    """Run the neurons of one site, whose threshold falls from level to level."""
    number = int(number_of_levels(p))
    time = falling(x.float().abs(), p["thresholds"][:number])
    parts = p["levels"][1 : number + 1].split(slots)
    windows = tuple(FreeWindow(tuple(part.flip(-1).tolist())) for part in parts)
    return SlotSpikes(x.sign().to(torch.int8), time, number, windows=windows)


def number_of_levels(p: Params) -> Tensor:
    """How many levels every site has, [*S]."""
    return torch.isfinite(p["thresholds"]).sum(-1)


def decoding(p: Params, slots: int) -> Decoding:
    """What decoding costs at every site: a multiplication a slot."""
    number = number_of_levels(p).double()
    neurons = (number / slots).ceil()
    return Decoding(number, torch.zeros_like(number), neurons - 1, number.clamp(max=slots))
