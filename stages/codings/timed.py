"""One spike in time with a silent zone: levels where the distribution wants them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from stages.atoms import Atoms
from stages.codings.base import Sensitive, check_prices
from stages.errors import InputError
from stages.fits.free_levels import free_levels, freed
from stages.fits.sensitivity import Sensitivity, loss_weight
from stages.fits.statistics import MULTIPLICATION, Products, Statistic, widths
from stages.fits.time_levels import Levels, Points, cheapest_levels, segments, total_cost
from stages.fitted import Fit
from stages.neurons import free_slots, slots
from stages.neurons.decoding import Decoding
from stages.neurons.spikes import Params
from stages.registry import register

LONGEST_WINDOW = 1024
MOST_LEVELS = 4096
LEVELS = ("shifts", "free")


@register("coding/timed")
@dataclass(frozen=True)
class Timed(Sensitive):
    """At most one spike a value, in one of `timesteps` slots of one of at most `grains` neurons, whose
    windows run at the same time; a magnitude in the silent zone sends none.

    `levels` shifts: they lie at gaps that are powers of two of one step, so that additions alone decode
    a window (`stages.neurons.slots`): nearly the optimal density λ* ∝ p^(1/3). free: as many, wherever
    errors are least, for a multiplication a slot (`stages.neurons.free_slots`).

    A site has as many levels, up to grains · timesteps, and as wide a silent zone, as lets squared
    errors + prices be least: E(SN(x) - x)^2 / E x^2, or with `sensitivity` the predicted loss in nats a
    token; `mu` for a spike a value, weighted by the site's part in all multiplications, and as much for
    what costs the same energy in decoding; `nu` for a level. A mean error, which is what the silence of
    small probabilities leaves, counts as often as the product is wide.
    Source of the quantiser: Chou, Lookabaugh & Gray 1989 (entropy-constrained); of decoding by running
    sums: time to first spike, e.g. Stöckl & Maass 2021 and Rueckauer & Liu 2018.
    """

    name: str = "timed"
    timesteps: int = 128
    grains: int = 1
    mu: float = 0.0
    nu: float = 0.0
    sensitivity: Sensitivity | None = None
    levels: str = "shifts"

    convention = "one_spike"

    def __post_init__(self) -> None:
        if type(self.timesteps) is not int or not 1 <= self.timesteps <= LONGEST_WINDOW:
            raise InputError(
                f"coding.timesteps={self.timesteps!r} for {self.name}: give a whole number from 1 to "
                f"{LONGEST_WINDOW}, the slots of a window"
            )
        most = MOST_LEVELS // self.timesteps
        if type(self.grains) is not int or not 1 <= self.grains <= most:
            raise InputError(
                f"coding.grains={self.grains!r} for {self.name}: give a whole number of neurons from 1 to "
                f"{most}, with coding.timesteps={self.timesteps}"
            )
        check_prices(self.name, mu=self.mu, nu=self.nu)
        if self.levels not in LEVELS:
            raise InputError(
                f"coding.levels={self.levels!r} for {self.name}: choose {' or '.join(LEVELS)}"
            )
        self.check_sensitivity("levels")

    @property
    def free(self) -> bool:
        """Whether levels lie anywhere."""
        return self.levels == "free"

    @property
    def bits(self) -> float:
        return math.log2(1 + self.grains * self.timesteps)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (*super().statistics, Products())

    def fit(self, atoms: Atoms) -> Fit:
        levels = self._levels(atoms)[0]
        return Fit(free_levels(levels) if self.free else segments(levels))

    def cost(self, seen: Atoms) -> Tensor:
        """What the levels of every site cost that are fitted to it, [sites]."""
        return self._levels(seen)[1]

    def _levels(self, atoms: Atoms) -> tuple[Levels, Tensor]:
        points, slot = self.objective(atoms)
        levels = cheapest_levels(points, slot, self.timesteps * self.grains)
        levels = freed(points, slot, levels) if self.free else levels
        return levels, total_cost(points, slot, levels)

    def objective(self, atoms: Atoms) -> tuple[Points, Tensor]:
        """What is coded at every site, with the weights of its errors and the price of its spikes; the
        price of a level [S]."""
        size = atoms.statistics[Products.name]
        macs, sums = size["macs"], size["accumulators"]
        if self.sensitivity is None:
            weight = atoms.errors() / atoms.power()[:, None]
        else:
            weight = loss_weight(atoms.statistics[self.sensitivity.name], atoms)
        negative = torch.full_like(atoms.weight, 0.5) if atoms.negative is None else atoms.negative
        order = atoms.value.sort(-1)
        given = (atoms.spread**2, weight, atoms.weight, 1 - 2 * negative)
        variance, heavy, mass, sign = (row.gather(-1, order.indices) for row in given)
        total = macs.sum().clamp(min=1e-300)
        spike, coherent = self.mu * macs / total, weight.sum(-1) * widths(size)
        points = Points(order.values, variance, heavy, mass, sign, spike, coherent)
        # A level is an addition of every accumulator, a window two multiplications; a free one one.
        shifts = 1 + 2 * MULTIPLICATION / self.timesteps
        additions = MULTIPLICATION if self.free else shifts
        return points, self.mu * additions * sums / total + self.nu

    def encode(self, x: Tensor, p: Params) -> slots.SlotSpikes:
        return (free_slots if self.free else slots).encode(x, p, self.timesteps)

    def table(self, p: Params) -> Tensor:
        """Magnitude of silence and of every level, [*S, 1 + most levels], the last one repeated."""
        if self.free:
            return p["levels"]
        levels = slots.levels(p, self.timesteps * self.grains) * p["scale"][..., None]
        return pad(levels, (1, 0))

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        return (free_slots if self.free else slots).quantise(x, p)

    def decoding(self, p: Params) -> Decoding:
        return (free_slots if self.free else slots).decoding(p, self.timesteps)
