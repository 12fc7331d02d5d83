"""Digits in time: a code in base R = 2^r, of each digit one spike at the step of its value, none for zero.

R = 2 is the bit-plane code, R = 2^T one spike in time, on the same levels. The T bits of a code are
grouped from the lowest on, so that the highest digit may have fewer; it is sent first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.neurons.spikes import popcount

HIGHEST = 31  # bits that the masks of digits cover


@dataclass(frozen=True)
class Digit:
    """A digit of R_i = 2^`bits` that counts `place` levels, and a slot for each of the `values` that it
    may have, from the highest to 1, in the order of time; then one for 0 where it always spikes.

    `thresholds`: the potential, in levels, at which it fires in each slot.
    """

    bits: int
    place: int
    values: tuple[int, ...]
    thresholds: tuple[float, ...]

    @property
    def merged(self) -> bool:
        """Whether its spike always comes and stands for the floor as well."""
        return self.values[-1] == 0


def digits_of(timesteps: int, bits: int, signed: bool, floor: bool) -> tuple[Digit, ...]:
    """The digits of a neuron of 2^T levels in base 2^`bits`, the highest first.

    Signed digits below the highest are the generalised non-adjacent form (Clark & Liang 1973), of which
    the highest takes what remains, up to R_i where others follow. `floor`: the highest always spikes.
    """
    digits: list[Digit] = []
    for lower in range((timesteps - 1) // bits, -1, -1):
        own = min(bits, timesteps - lower * bits)
        highest = not digits
        most = 2**own - 1 + (signed and highest and lower > 0)
        values = tuple(range(most, 0, -1))
        place = 1 << (lower * bits)
        thresholds: tuple[float, ...] = tuple(float(d * place) for d in values)
        if signed:
            thresholds = tuple(signed_threshold(d, bits, lower) for d in values)
        if floor and highest:
            values, thresholds = (*values, 0), (*thresholds, -torch.inf)
        digits.append(Digit(own, place, values, thresholds))
    return tuple(digits)


def signed_threshold(value: int, bits: int, lower: int) -> float:
    """Where a digit with `lower` ones below it becomes `value`, in levels.

    Half a level above the most that the form reaches with value - 1: behind a digit d follow at most
    R - 1 - d, d, R - 1 - d, … of its sign.
    """
    base, digit = 1 << bits, value - 1
    most = digit * base**lower
    for place in range(lower - 1, -1, -1):
        digit = base - 1 - digit
        most += digit * base**place
    return most + 0.5


def exponent(steps: Tensor) -> Tensor:
    """T of whole powers of two 2^T, int32."""
    return (steps.float().view(torch.int32) >> 23) - 127


def top_place(steps: Tensor, bits: int | Tensor) -> Tensor:
    """What the highest digit of neurons of `steps` = 2^T levels counts, in levels, int32.

    Of the bits of 2^T - 1 the highest with which a digit begins, read off a float32's exponent.
    """
    first = _masks(bits)[1] >> (bits - 1)
    begins = (first & (steps.to(torch.int32) - 1)).float().view(torch.int32)
    return (begins & 0x7F800000).view(torch.float32).to(torch.int32)


def nonzero(code: Tensor, bits: int | Tensor) -> Tensor:
    """Number of non-zero digits of whole numbers code >= 0 (int32, below 2^16), float32.

    The lower bits of a digit plus a one at each of them carry into its highest unless all are zero.
    """
    low, high = _masks(bits)
    return popcount(((code & low) + low | code) & high)


def _masks(bits: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """The lower bits of every digit, and the highest of every digit."""
    if isinstance(bits, int):
        high = sum(1 << j for j in range(bits - 1, HIGHEST, bits))
        return (1 << (HIGHEST // bits * bits)) - 1 - high, high
    place = torch.arange(HIGHEST, device=bits.device)
    one, covered = 1 << place, HIGHEST // bits[..., None] * bits[..., None]
    last = (place + 1) % bits[..., None] == 0
    high_bits = torch.where(last, one, 0).sum(-1)
    low_bits = torch.where(~last & (place < covered), one, 0).sum(-1)
    return low_bits.to(torch.int32), high_bits.to(torch.int32)


def signed_count(code: Tensor, place: Tensor, bits: int | Tensor) -> tuple[Tensor, Tensor]:
    """Spikes of the signed digits below the highest, and whether the highest is not zero.

    code int32; place: that of the highest digit. Digit i is digit i + 1 of (R + 1) code less that of
    code (Clark & Liang 1973).
    """
    base = 1 << bits if isinstance(bits, int) else torch.ones_like(bits) << bits
    more = (base + 1) * code
    below = nonzero(((more ^ code) >> bits) & (place - 1), bits)
    rest = ((more & (place * base - 1)) >> bits) - (code >> bits)
    return below, code > rest


def decode_costs(
    steps: Tensor, bits: Tensor, signed: bool, merged: Tensor
) -> tuple[Tensor, Tensor]:
    """Slots that neurons take, and additions by which running sums decode them, each as `steps`.

    steps = 2^T, bits and merged (whether the floor's spike is that of the highest digit), all [*S, n]. A
    digit that has one slot adds to the total itself.
    """
    timesteps = exponent(steps)
    lower = torch.div(timesteps - 1, bits, rounding_mode="floor")
    top = 2 ** (timesteps - lower * bits) - 1
    if signed:
        top = top + ((lower > 0) & (bits > 1))
    rest = lower * (2**bits - 1)
    additions = torch.where(bits > 1, rest, 0) + torch.where((top > 1) | merged, top, 0)
    return rest + top + merged, additions
