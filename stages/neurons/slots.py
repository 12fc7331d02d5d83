"""One spike in time: levels whose gaps are powers of two of one step, sent as the slot of a spike.

Levels are whole multiples of a step delta. They lie in segments of equal gaps, which double or stay from
zero outwards: the levels of segment g lie gap_g apart, the first of them gap_g beyond base_g, the last
level of the segment below, and the last at end_g. A magnitude below the first threshold is silent.
Parameters carry the site dimensions in front: scale [*S] = delta; start, base, gap, end [*S, G] in units
of delta, where start_g is the smallest magnitude of segment g and start_0 the end of the silent zone; a
place without a segment repeats the last one and starts at infinity.

Where there are more levels than a window has slots, the lowest ones are those of a first neuron, the next
ones of a second with a window at the same time, and so on; the magnitude chooses the neuron. Decoding:
A(t) sums what has arrived in a window, and out += A(t) 2^e(t) with the gap 2^e(t) below the level of slot
t sums a level up out of its gaps, an addition a slot; what lies below the neuron's lowest gap is one
multiplication of all that has arrived.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.neurons.decoding import Decoding
from stages.neurons.spikes import Params, SpikeTime


@dataclass(frozen=True)
class Window:
    """The slots of a neuron, from its highest level down: `gaps`, the power of two of the gap below each,
    and `floor`, what lies below the last of them in units of delta."""

    gaps: tuple[int, ...]
    floor: float

    @property
    def slots(self) -> int:
        return len(self.gaps)


@dataclass(frozen=True)
class FreeWindow:
    """The slots of a neuron by what a spike of each is worth, from its highest level down."""

    levels: tuple[float, ...]

    @property
    def slots(self) -> int:
        return len(self.levels)


@dataclass(frozen=True)
class SlotSpikes(SpikeTime):
    """At most one spike a value, time [*X] counted from the highest level of all; the windows of the
    neurons, the one of the lowest levels first, in units of `unit` where they have gaps."""

    windows: tuple[Window, ...] | tuple[FreeWindow, ...] = ()
    unit: float = 1.0

    @property
    def code(self) -> Tensor:
        """The number of the level from the lowest on, 0 for silence, shape [*X]."""
        return self.timesteps - self.time.long()


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
    place = (u - base) / gap  # exact above base: both are multiples of the last place of u
    whole = torch.floor(place)
    nearest = whole + (place - whole >= 0.5).to(place.dtype)
    level = torch.minimum(base + nearest.clamp(min=1) * gap, end) * p["scale"][..., None]
    level = torch.where(u < p["start"][..., 0, None], 0.0, level)  # what is not a number stays so
    return torch.sign(x).float() * level, fires.to(level.dtype)


def encode(x: Tensor, p: Params, slots: int) -> SlotSpikes:
    """Run the neurons of one site: the threshold falls from level to level, and the first that the
    magnitude reaches is the slot of the one spike."""
    u = x.float().abs() / p["scale"]
    threshold = thresholds(p)
    return SlotSpikes(
        x.sign().to(torch.int8),
        falling(u, threshold),
        len(threshold),
        windows=tuple(windows(p, slots)),
        unit=float(p["scale"]),
    )


def falling(u: Tensor, thresholds: Tensor) -> Tensor:
    """The time of the one spike of every magnitude [*X]: the first of the thresholds [K], from the
    highest on, that it reaches, else K."""
    number = len(thresholds)
    time = torch.full_like(u, number, dtype=torch.long)
    for t, theta in enumerate(thresholds.flip(-1)):
        time = torch.where((time == number) & (u >= theta), t, time)
    return time


def levels(p: Params, most: int) -> Tensor:
    """The levels of every site in units of delta, [*S, most] ascending, the last one repeated."""
    counts = _counts(p).cumsum(-1)
    index = torch.arange(most, device=counts.device, dtype=counts.dtype)
    index = torch.minimum(index.expand(*counts.shape[:-1], -1), counts[..., -1:] - 1).contiguous()
    place = torch.searchsorted(counts.contiguous(), index, right=True)
    before = torch.nn.functional.pad(counts, (1, 0)).gather(-1, place)
    base, gap = (p[name].gather(-1, place) for name in ("base", "gap"))
    return base + (index - before + 1) * gap


def thresholds(p: Params) -> Tensor:
    """The smallest magnitude of every level of one site in units of delta, [K] ascending."""
    every = levels(p, int(number_of_levels(p)))
    middle = (every[1:] + every[:-1]) / 2
    return torch.cat([p["start"][:1], middle])


def windows(p: Params, slots: int) -> list[Window]:
    """The neurons of one site, of which each has `slots` slots, the last one as many as are left."""
    every = levels(p, int(number_of_levels(p)))
    below = torch.cat([p["base"][:1], every[:-1]])
    gaps = (every - below).log2().round().int()
    parts = zip(gaps.split(slots), below.split(slots), strict=True)
    return [Window(tuple(gap.flip(-1).tolist()), float(floor[0])) for gap, floor in parts]


def number_of_levels(p: Params) -> Tensor:
    """How many levels every site has, [*S]."""
    return _counts(p).sum(-1)


def _counts(p: Params) -> Tensor:
    """Levels of every segment, [*S, G]."""
    number = ((p["end"] - p["base"]) / p["gap"]).round()
    return torch.where(torch.isfinite(p["start"]), number, 0.0)


def decoding(p: Params, slots: int) -> Decoding:
    """What decoding costs at every site: an addition a slot, but for a window of one; a multiplication a
    neuron and one for what lies below its levels."""
    number = number_of_levels(p).double()
    neurons = (number / slots).ceil()
    alone = ((number % slots == 1) | (number.new_tensor(slots) == 1)).double()
    floors = neurons - (p["base"][..., 0] == 0).double()
    single = torch.where(number.new_tensor(slots) == 1, number, alone)
    return Decoding(
        macs=neurons + floors,
        acs=number - single,
        comparisons=neurons - 1,
        steps=number.clamp(max=slots),
    )
