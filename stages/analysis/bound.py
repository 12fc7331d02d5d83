"""The least error that any code has at a mean number of spikes, beside which a coding's own stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.atoms import Atoms, cells
from stages.codings.base import SITES_AT_ONCE, Coding
from stages.neurons.spikes import Params

RAREST = 1e-3  # share of values whose density is known well enough
FULLEST = 2 / 3  # spikes a slot at which silence and either sign are equally likely
EVERY = 16  # cells between two magnitudes that are tried as the border of large values
THIRDS = 30  # cut off the parts of a budget that large values may have, until one is left


def distance_db(
    coding: Coding, atoms: Atoms, params: Params, error: Tensor, spikes: Tensor
) -> Tensor:
    """How far the squared error of every site lies above the least of any code of so many signed spikes
    in its slots, 10 log10(error / least), [S] float64.

    `atoms` are what the neurons see, and `error` and `spikes` [S] theirs on them. A bound has no spikes:
    its rate is that of its levels, T bits of magnitude with the sign, and zero; that of integers is
    their bits. NaN where there is no
    error of a single value (a code of whole tokens), where an error weighs differently from value to
    value (channels with scales), and at a site without error or without a density (zero but for one
    value in a thousand).

    Sources: the error at a rate, Shannon 1959; the bits of a spike train, MacKay & McCulloch 1952, and
    Rieke, Warland, de Ruyter van Steveninck & Bialek 1997, Spikes, chapter 3.
    """
    if coding.tokenwise:
        return torch.full_like(error, torch.nan)
    places = slots(coding, params)[:, None]
    levels = coding.operand_bits or math.log2(2 ** (coding.timesteps + 1) + 1)
    parts = []
    for index in torch.arange(len(error)).split(SITES_AT_ONCE):
        most, part = places[index], atoms.rows(index)

        def bits(mean: Tensor, most: Tensor = most) -> Tensor:
            return train_bits(mean, most) if coding.neuron else torch.full_like(mean, levels)

        budget = spikes[index] if coding.neuron else torch.zeros(len(index), dtype=torch.float64)
        parts.append(least_error(part, budget, bits))
    least = torch.cat(parts)
    known = (error > 0) & (least > 0) & _unweighted(atoms)
    return torch.where(known, 10 * (error / least).log10(), torch.nan)


def slots(coding: Coding, params: Params) -> Tensor:
    """How many spikes a value of every site may have at most, [S] float64: the steps of each of the
    neurons that it chooses from, and one for each floor."""
    decoding = coding.decoding(params)
    places = (decoding.comparisons + 1) * decoding.steps
    floors = [value for name, value in params.items() if name.startswith("floor")]
    return places + sum(((floor > 0).sum(-1) for floor in floors), torch.zeros_like(places))


def train_bits(spikes: Tensor, places: Tensor) -> Tensor:
    """The most bits that a train of signed spikes carries whose mean number is at most s in m slots.

    m H(p) + m p at p = s / m, with H the binary entropy and a bit for every sign (MacKay & McCulloch
    1952), up to p = 2/3, where it is m log2(3): more spikes are allowed, and carry no more.
    """
    p = (spikes / places).clamp(max=FULLEST)
    return places * (
        p - (torch.special.xlogy(p, p) + torch.special.xlog1py(1 - p, -p)) / math.log(2)
    )


def least_error(atoms: Atoms, budget: Tensor, bits: Callable[[Tensor], Tensor]) -> Tensor:
    """A lower bound of the mean squared error of any code of single values, [S] float64.

    A code may spend `budget` [S] a value, and values that it spends b on in the mean have at most
    bits(b) bits each, concave and not falling, [S, K] -> [S, K].

    Shannon's lower bound for a density of differential entropy h is D >= 2^(2 h - 2 R) / (2 pi e) at R
    bits a value (Shannon 1959; Berger 1971, section 4.3; Cover & Thomas 2006, chapter 10). A site that
    is zero with probability q has no density, and one of heavy tails a weak bound. So let somebody
    tell the decoder for nothing whether x is zero, small (|x| <= r) or large: no code gets worse by it.
    Zeros then need neither budget nor error, and

        D >= min over b of w 2^(2 h - 2 bits(b)) / (2 pi e) + w' 2^(2 h' - 2 bits(b')) / (2 pi e)

    with w b + w' b' the budget, w and w' the probabilities of small and large values, h and h' their
    conditional entropies. It holds for every r >= 0, so that its largest value does; r = 0 is
    (1 - q) 2^(2 h - 2 bits(budget / (1 - q))) / (2 pi e). What is told is worth H(q) bits, but to take
    these off a rate, R = H(q) + (1 - q) R', would be no bound: a code of fewer bits does not tell it,
    and at R = 0 more error would be asked for than silence has.
    A density is even in each of the cells of `atoms`; an r that fewer than one value in a thousand
    exceeds is not tried, nor do as few small values need anything.
    """
    small, large = _classes(atoms)
    known = large.share >= RAREST

    def total(part: Tensor) -> Tensor:
        """The error where large values have a `part` of the budget, convex in it."""
        given = ((large, part), (small, 1 - part))
        spent = ((each, of * budget[:, None] / each.share.clamp(min=RAREST)) for each, of in given)
        return sum((each.error(bits(mean)) for each, mean in spent), torch.zeros(()))

    low, high = torch.zeros_like(large.share), torch.ones_like(large.share)
    for _ in range(THIRDS):
        left, right = (2 * low + high) / 3, (low + 2 * high) / 3
        falling = total(left) > total(right)
        low, high = torch.where(falling, left, low), torch.where(falling, high, right)
    return torch.where(known, torch.minimum(total(high), total(low)), 0.0).amax(-1)


@dataclass(frozen=True)
class _Class:
    """Values of some magnitudes: their `share` of all, and what they add to the integral of -p log2(p),
    signs included, each [S, K]."""

    share: Tensor
    surprise: Tensor

    def error(self, bits: Tensor) -> Tensor:
        """Their part in the least squared error at so many bits each [S, K]; none of few values."""
        known = self.share.clamp(min=RAREST)
        entropy = self.surprise / known + known.log2()
        least = self.share * 2 ** (2 * (entropy - bits)) / (2 * math.pi * math.e)
        return torch.where(self.share >= RAREST, least, 0.0)


def _classes(atoms: Atoms) -> tuple[_Class, _Class]:
    """Small and large values for borders at every so many cells; those at a single point are neither."""
    edges, weight = cells(atoms)
    width = edges.diff()
    mass = torch.where(width > 0, weight, 0.0)
    positive = (atoms.weight > 0) & (atoms.value > 0)
    order = (~positive).int().argsort(dim=-1, stable=True)  # that of the cells
    below = torch.full_like(atoms.weight, 0.5) if atoms.negative is None else atoms.negative
    below = below.gather(-1, order)
    sign = -(torch.special.xlogy(below, below) + torch.special.xlog1py(1 - below, -below))
    nats = torch.where(mass > 0, (width / mass.clamp(min=1e-300)).clamp(min=1e-300).log() + sign, 0)
    share, surprise = (_from_above(each) for each in (mass, mass * nats / math.log(2)))
    whole, total = share[:, :1], surprise[:, :1]
    share, surprise = share[:, ::EVERY], surprise[:, ::EVERY]
    return _Class(whole - share, total - surprise), _Class(share, surprise)


def _from_above(x: Tensor) -> Tensor:
    """The sum of every place and those behind it, [S, K]."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _unweighted(atoms: Atoms) -> Tensor:
    """At which sites a squared error weighs the same everywhere, [S]."""
    if atoms.gain is None:
        return torch.ones(len(atoms.weight), dtype=torch.bool)
    return ((atoms.gain - 1).abs() < 1e-6).logical_or(atoms.weight == 0).all(-1)
