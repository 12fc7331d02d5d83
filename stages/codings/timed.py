"""One spike in time with a silent zone: levels where the distribution wants them, prices for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Scaled
from stages.errors import InputError
from stages.fits.sensitivity import Sensitivity, loss_weight
from stages.fits.statistics import Products, Statistic
from stages.fits.time_levels import Points, cheapest_levels, segments
from stages.fitted import Fit
from stages.neurons import slots
from stages.neurons.spikes import Params, SpikeTime
from stages.registry import register

LONGEST_WINDOW = 4096
import os
COH=float(os.environ.get('COH','1'))
MULTIPLICATION = 5.1  # additions that cost as much: 4.6 and 0.9 pJ in 45 nm logic (Horowitz 2014)


@register("coding/timed")
@dataclass(frozen=True)
class Timed(Scaled):
    """x"""

    name: str = "timed"
    timesteps: int = 128
    grains: int = 1
    mu: float = 0.0
    nu: float = 0.0
    sensitivity: Sensitivity | None = None

    convention = "one_spike"

    def __post_init__(self) -> None:
        if not isinstance(self.timesteps, int) or not 1 <= self.timesteps <= LONGEST_WINDOW:
            raise InputError(
                f"coding.timesteps={self.timesteps!r} for {self.name}: give a whole number from 1 to "
                f"{LONGEST_WINDOW}"
            )
        self.check_scale()

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (*super().statistics, *filter(None, (self.sensitivity,)), Products())

    def fit(self, atoms: Atoms) -> Fit:
        points, slot = self.prices(atoms)
        return Fit(segments(cheapest_levels(points, slot, self.timesteps * self.grains)))

    def prices(self, atoms: Atoms) -> tuple[Points, Tensor]:
        """The points of every site with their weights, and the price of a slot [S]."""
        size = atoms.statistics[Products.name]
        macs, sums = size["macs"], size["accumulators"]
        if self.sensitivity is None:
            weight = atoms.errors() / atoms.power()[:, None]
        else:
            weight = loss_weight(atoms.statistics[self.sensitivity.name], atoms)
        width = torch.where(sums > 0, macs / sums.clamp(min=1e-300), 0.0)
        negative = torch.full_like(atoms.weight, 0.5) if atoms.negative is None else atoms.negative
        order = atoms.value.sort(-1)
        rows = (atoms.spread**2, weight, atoms.weight, 1 - 2 * negative)
        sorted_rows = (t.gather(-1, order.indices) for t in rows)
        coherent = COH * weight.sum(-1) * width
        points = Points(order.values, *sorted_rows, self.mu * macs / macs.sum(), coherent)
        return points, self.mu * sums / macs.sum() + self.nu

    def encode(self, x: Tensor, p: Params) -> SpikeTime:
        u = x.float().abs() / p["scale"]
        threshold = slots.thresholds(p)
        number = len(threshold)
        time = torch.full_like(u, number, dtype=torch.long)
        for t, theta in enumerate(threshold.flip(-1)):
            time = torch.where((time == number) & (u >= theta), t, time)
        return SpikeTime(x.sign().to(torch.int8), time, number)

    def table(self, p: Params) -> Tensor:
        return torch.nn.functional.pad((slots.levels(p) * p["scale"]).flip(-1), (0, 1))

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        return slots.quantise(x, p)
