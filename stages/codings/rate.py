"""Rate coding: an integrate-and-fire neuron with soft reset that drains one injected charge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.codings.base import Fit, check_timesteps, half_step
from stages.neurons import neurons
from stages.registry import register

if TYPE_CHECKING:
    from stages.distribution import Atoms
    from stages.fitting import Algorithm1


@register("coding/rate", was="stages.codings.rate.Rate")
@dataclass(frozen=True)
class Rate:
    """Every step weighs scale / T: T + 1 evenly spaced magnitudes, n spikes for the n-th (unary).

    `v0` zero floors, half_step (1 / 2T) rounds. Not trained; scale is the largest magnitude.
    """

    name: str = "rate"
    timesteps: int = 6
    v0: str = "half_step"

    grains = 1
    trained = False
    neuron = True
    convention = "unary"
    decode_macs = 1  # one weight for all steps
    gate_comparisons = 0

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)
        half_step(self.timesteps, self.v0, self.name)

    def fit(self, atoms: Atoms, algorithm: Algorithm1 | None) -> Fit:
        step = torch.full((self.timesteps,), 1 / self.timesteps)
        v0 = float(step[-1]) / 2 if self.v0 == "half_step" else 0.0
        return Fit(neurons.fixed_steps(atoms.scale(), step, v0))

    def encode(self, x: Tensor, p: neurons.Params) -> neurons.Spikes:
        return neurons.step_encode(x, p)

    def table(self, p: neurons.Params) -> Tensor:
        return neurons.step_table(p)

    def quantise(self, x: Tensor, p: neurons.Params) -> tuple[Tensor, Tensor]:
        return neurons.step_quantise(x, p)
