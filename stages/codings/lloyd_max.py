"""The optimal scalar quantiser of 2^T magnitudes: a bound for every ungated code, not a neuron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Coding, check_timesteps
from stages.fits.quantiser import companded_cells, lloyd, optimal_cells
from stages.fitted import Fit
from stages.neurons.levels import level_params, table_quantise
from stages.neurons.spikes import Params
from stages.registry import register

EXACT_LEVELS = 64  # dynamic programming up to here; beyond, companded levels are near-optimal
ITERATIONS = 200


@register("coding/lloyd_max", was="stages.codings.lloyd_max.LloydMax")
@dataclass(frozen=True)
class LloydMax(Coding):
    """2^T magnitude levels of least mean squared error, and the sign (zero stays zero).

    Sources: Lloyd 1957/1982, Max 1960; the start is the optimum over merged atoms by dynamic
    programming (T <= 6), else the p^(1/3) compander (Panter & Dite 1951).
    """

    name: str = "lloyd_max"
    timesteps: int = 6

    neuron = False
    convention = "none"

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)

    def fit(self, atoms: Atoms) -> Fit:
        x, weight = atoms.points()
        order = x.sort(-1)
        x, weight = order.values, weight.gather(-1, order.indices)
        weight = torch.where(x > 0, weight, 0.0)  # zero has a code of its own, the missing sign
        levels = 2**self.timesteps
        start = optimal_cells if levels <= EXACT_LEVELS else companded_cells
        return Fit(level_params(lloyd(x, weight, start(x, weight, levels), ITERATIONS)))

    def encode(self, x: Tensor, p: Params) -> NoReturn:
        raise NotImplementedError(f"{self.name} is a bound, not a neuron: it has no spike train")

    def table(self, p: Params) -> Tensor:
        return p["levels"]

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        value = table_quantise(x, p)
        return value, torch.full_like(value, torch.nan)
