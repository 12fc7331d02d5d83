"""A bank of neurons over consecutive ranges of |x|, each with 2^T_k even levels and an offset.

Neuron k codes |x| - floor_k on the width scale_k - floor_k with T_k bits; the smallest k whose range
holds |x| fires, else the last, which saturates. Parameters carry the site dimensions in front: scale
[*S, n] ascending; steps [*S, n] = 2^T_k (absent: `timesteps` everywhere); floor [*S, n] (absent: zero);
radix [*S] = r (absent: that of the coding): bits are sent by digits of r, see `stages.neurons.digits`.
A neuron with a floor above zero spends one more spike on it; of digits of more than one bit the highest
then always spikes, and its spike is the floor's as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.neurons.decoding import Decoding
from stages.neurons.digits import (
    Digit,
    decode_costs,
    digits_of,
    exponent,
    nonzero,
    signed_count,
    top_place,
)
from stages.neurons.spikes import Params, Spikes, popcount

RADIX = "radix"  # the parameter that holds the bits of a digit, [*S]
LIMIT, STEP = "limit", "step"  # what `prepared` adds, [*S, n]: where a neuron saturates, and 2^-T_k


@dataclass(frozen=True)
class RangeSpikes(Spikes):
    """A spike train, train [T, *X] in {-1, 0, 1}, and the spike for the floor, floor [*X] bool."""

    floor: Tensor

    @property
    def count(self) -> Tensor:
        return self.train.abs().sum(0) + self.floor


@dataclass(frozen=True)
class DigitSpikes(RangeSpikes):
    """A spike train of digits, train [slots, *X], whose floors have no spike of their own; `neurons` are
    the digits of each, `longest` the most bits that one may have."""

    neurons: tuple[tuple[Digit, ...], ...]
    longest: int

    @property
    def code(self) -> Tensor:
        """The integer code grain 2^longest + sum of digit place 2^(longest - T_k), shape [*X]."""
        grain = self.grain.long()
        code = grain << self.longest
        for slot, spikes in enumerate(self.train):
            code = code + self.worth[slot].to(grain.device)[grain] * spikes.long()
        return code

    @property
    def worth(self) -> Tensor:
        """By how much a spike of every slot and neuron raises the code, [slots, n]."""
        shifts = [self.longest - sum(digit.bits for digit in each) for each in self.neurons]
        pairs = zip(self.neurons, shifts, strict=True)
        return _by_slot([[d * o.place << s for o in n for d in o.values] for n, s in pairs], 0)


@dataclass(frozen=True)
class Bank:
    """The neurons of a bank, each tensor [*S, n]."""

    width: Tensor
    floor: Tensor
    steps: Tensor
    limit: Tensor  # where a neuron starts to saturate: half a step above its last level
    step: Tensor  # 2^-T_k, by which a product is exact

    @classmethod
    def of(cls, p: Params, timesteps: int) -> Bank:
        scale = p["scale"]
        steps = p.get("steps", torch.full_like(scale, 2.0**timesteps))
        floor = p.get("floor", torch.zeros_like(scale))
        width = scale - floor
        if LIMIT in p:
            return cls(width, floor, steps, p[LIMIT], p[STEP])
        return cls(width, floor, steps, floor + width * (1 - 0.5 / steps), 1 / steps)

    def gate(self, magnitude: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """Number, width, floor and steps of the neuron of every value, and what `more` [*S, n] has for it:
        magnitude [*S, K] -> [*S, K]."""
        last = self.width.shape[-1] - 1
        limit = self.limit
        neuron = (self.width, self.floor, self.steps, *more)
        parts = [t[..., last, None] for t in neuron]
        grain = torch.full_like(magnitude, last)
        for k in range(last - 1, -1, -1):
            inside = magnitude < limit[..., k, None]
            pairs = zip(neuron, parts, strict=True)
            parts = [torch.where(inside, t[..., k, None], rest) for t, rest in pairs]
            grain = torch.where(inside, float(k), grain)
        return grain, *parts


def prepared(p: Params, timesteps: int) -> dict[str, Tensor]:
    """The parameters, with what follows from them: `LIMIT` and `STEP`."""
    bank = Bank.of(p, timesteps)
    return {**p, LIMIT: bank.limit, STEP: bank.step}


def threshold(steps: Tensor, t: int) -> Tensor:
    """theta(t) of signed digits in units of the width; infinite after the last step.

    Half a level above the largest number that the later steps reach without two spikes in a row,
    (floor(2^(T-t) 2/3) + 1/2) 2^-T: the digits are the non-adjacent form (Reitwiesner 1960).
    """
    place = steps * 2.0**-t
    return torch.where(place >= 1, (torch.floor(place * (2 / 3)) + 0.5) / steps, torch.inf)


def encode(
    x: Tensor, p: Params, timesteps: int, longest: int, signed: bool, bits: int = 1
) -> RangeSpikes:
    """Run the chosen neuron of one site over `longest` steps; it stays silent after its last.

    Binary: v(1) = u + 2^-(T+1), s = [v >= 2^-t]. Signed: v(1) = u, s = [v >= theta(t)] -
    [v < -theta(t)]; halves round up in both. Digits of more than one bit: `encode_digits`.
    """
    bits = int(p[RADIX]) if RADIX in p else bits
    if bits > 1:
        return encode_digits(x, p, timesteps, longest, signed, bits)
    magnitude = x.float().abs()
    grain, width, floor, steps = Bank.of(p, timesteps).gate(magnitude)
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
        train.append(spike)
    return RangeSpikes(x.sign().to(torch.int8), grain, torch.stack(train), floor > 0)


def encode_digits(
    x: Tensor, p: Params, timesteps: int, longest: int, signed: bool, bits: int
) -> DigitSpikes:
    """Run the chosen neuron of one site over the slots of its digits.

    Its threshold falls from the highest value of a digit to the lowest and starts again with the next
    digit; after a spike it is silent until then. Binary: s = [v >= d place]; signed: s = [v >= theta]
    - [v < -theta]; then v loses d place. Slots for zero fire where their digit has not.
    """
    bank = Bank.of(p, timesteps)
    pairs = zip(exponent(bank.steps).tolist(), (bank.floor > 0).tolist(), strict=True)
    neurons = tuple(digits_of(t, bits, signed, floor) for t, floor in pairs)
    fires = _by_slot([[v for o in n for v in o.thresholds] for n in neurons], torch.inf)
    lost = _by_slot([[d * o.place for o in n for d in o.values] for n in neurons], 0)
    begins = _by_slot([[not i for o in n for i in range(len(o.values))] for n in neurons], False)
    magnitude = x.float().abs()
    grain, width, floor, steps = bank.gate(magnitude)
    v, index = (magnitude - floor) / width, grain.long()
    v = torch.minimum(v.clamp(min=0), 1 - 1 / steps) if signed else v + 0.5 / steps
    silent = torch.ones_like(v, dtype=torch.bool)
    train = []
    for theta, place, first in zip(*(t.to(v.device) for t in (fires, lost, begins)), strict=True):
        silent = silent | first[index]
        level, worth = theta.float()[index] / steps, place.float()[index] / steps
        spike = (v >= level).to(v.dtype)
        if signed:
            spike = spike - ((v < -level) & (worth > 0)).to(v.dtype)
        spike = torch.where(silent, spike, 0.0)
        v, silent = v - spike * worth, silent & (spike == 0)
        train.append(spike.to(torch.int8))
    alone = torch.zeros_like(silent)
    sign = x.sign().to(torch.int8)
    return DigitSpikes(sign, grain, torch.stack(train), alone, neurons, longest)


def _by_slot(rows: list[list[Any]], rest: float) -> Tensor:
    """One number a slot of every neuron, [slots, n], with `rest` behind the last of each."""
    slots = max(map(len, rows))
    return torch.tensor([row + [rest] * (slots - len(row)) for row in rows]).T


def table(p: Params, timesteps: int, longest: int) -> Tensor:
    """Magnitude of every code grain 2^longest + sum_t 2^(longest-t) s(t), [*S, n 2^longest] float32."""
    bank = Bank.of(p, timesteps)
    level = torch.arange(2**longest, device=bank.width.device) * 2.0**-longest
    return (level * bank.width[..., None] + bank.floor[..., None]).flatten(-2)


def quantise(
    x: Tensor, p: Params, timesteps: int, signed: bool, bits: int = 1
) -> tuple[Tensor, Tensor]:
    """Value (float32) and spikes of every x in one elementwise expression."""
    magnitude = x.float().abs()
    bank = Bank.of(p, timesteps)
    plain = bits == 1 and RADIX not in p
    highest = not plain and (signed or "floor" in p)  # whether the count asks where that digit is
    more = (top_place(bank.steps, _bits(p, bits, 1)),) if highest else ()
    _, width, floor, steps, step, *place = bank.gate(magnitude, bank.step, *more)
    u = (magnitude - floor) / width
    if signed:
        place_of = u * steps  # steps are a power of two, so this and what follows is exact
        whole = torch.floor(place_of)
        code = whole + (place_of - whole >= 0.5).to(place_of.dtype)
    else:
        code = torch.floor((u + 0.5 * step) * steps)
    code = torch.minimum(code.clamp(min=0), steps - 1)
    if plain:
        count = digits(code.float(), steps.float()) if signed else popcount(code)
        count = count + (floor > 0)
    else:
        top = place[0] if highest else None
        count = _digit_count(code, steps, floor > 0, top, signed, _bits(p, bits, 1))
    return torch.sign(x).float() * (code * step * width + floor), count


def _bits(p: Params, bits: int, dims: int) -> int | Tensor:
    """Bits of a digit: those of every site, int32 [*S, 1, …] with so many dimensions behind, or `bits`."""
    if RADIX not in p:
        return bits
    sites = p[RADIX].to(torch.int32)
    return sites.reshape(*sites.shape, *[1] * dims)


def _digit_count(
    code: Tensor,
    steps: Tensor,
    floor: Tensor,
    place: Tensor | None,
    signed: bool,
    bits: int | Tensor,
) -> Tensor:
    """Spikes of whole numbers 0 <= code < steps = 2^T; `place` is that of the highest digit, `floor`
    whether it spikes for a floor too."""
    whole = code.to(torch.int32)
    if place is None:
        return nonzero(whole, bits)
    if not signed:
        merged = floor if isinstance(bits, int) else floor & (bits > 1)
        return nonzero(torch.where(merged, whole & (place - 1), whole), bits) + floor
    below, top = signed_count(whole, place, bits)
    count = below + (top | floor)
    if isinstance(bits, int):
        return count
    return torch.where(bits > 1, count, digits(code.float(), steps.float()) + floor)


def decoding(p: Params, timesteps: int, signed: bool, bits: int = 1) -> Decoding:
    """What decoding the neurons of every site costs, [*S]: a multiplication a neuron and one more for
    its floor, and the additions of running sums."""
    bank = Bank.of(p, timesteps)
    own = torch.as_tensor(_bits(p, bits, 1), device=bank.steps.device).expand_as(bank.steps)
    floor = bank.floor > 0
    merged = floor & (own > 1)
    slots, additions = decode_costs(bank.steps, own, signed, merged)
    neurons = bank.steps.shape[-1]
    return Decoding(
        macs=(neurons + floor.sum(-1)).double(),
        acs=additions.sum(-1).double(),
        comparisons=torch.full_like(slots[..., 0], neurons - 1, dtype=torch.float64),
        steps=slots.amax(-1).double(),
    )


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
