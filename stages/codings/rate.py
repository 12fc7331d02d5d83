"""Rate coding: an integrate-and-fire neuron with soft reset that drains one injected charge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Coding, check_timesteps, half_step
from stages.fitted import Fit
from stages.neurons.spikes import Params, Spikes
from stages.neurons.step import fixed_steps, step_encode, step_quantise, step_table
from stages.registry import register


@register("coding/rate", was="stages.codings.rate.Rate")
@dataclass(frozen=True)
class Rate(Coding):
    """Every step weighs scale / T: T + 1 evenly spaced magnitudes, n spikes for the n-th (unary).

    `v0` zero floors, half_step (1 / 2T) rounds. Not trained; scale is the largest magnitude.
    """

    name: str = "rate"
    timesteps: int = 6
    v0: str = "half_step"

    convention = "unary"
    decode_macs = 1  # one weight for all steps

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)
        half_step(self.timesteps, self.v0, self.name)

    def fit(self, atoms: Atoms) -> Fit:
        step = torch.full((self.timesteps,), 1 / self.timesteps)
        v0 = float(step[-1]) / 2 if self.v0 == "half_step" else 0.0
        return Fit(fixed_steps(atoms.scale(), step, v0))

    def encode(self, x: Tensor, p: Params) -> Spikes:
        return step_encode(x, p)

    def table(self, p: Params) -> Tensor:
        return step_table(p)

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        return step_quantise(x, p)
