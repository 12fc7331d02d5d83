"""Phase coding cut off after its first spikes: the SpikedAttention row as the paper's code runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.codings.base import Fit, check_timesteps, half_step
from stages.errors import InputError
from stages.neurons import neurons
from stages.registry import register

if TYPE_CHECKING:
    from stages.distribution import Atoms
    from stages.fitting import Algorithm1


@register("coding/two_spike", was="stages.codings.two_spike.TwoSpike")
@dataclass(frozen=True)
class TwoSpike:
    """Base 2, scale the largest magnitude, at most `max_spikes` spikes a value: relative error, so
    more steps do not help beyond about 19 dB. Not trained."""

    name: str = "two_spike"
    timesteps: int = 6
    v0: str = "half_step"
    max_spikes: int = 2

    grains = 1
    trained = False
    neuron = True
    convention = "bit_plane"
    decode_macs = 1
    gate_comparisons = 0

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)
        half_step(self.timesteps, self.v0, self.name)
        if not isinstance(self.max_spikes, int) or self.max_spikes < 1:
            raise InputError(f"coding.max_spikes={self.max_spikes}: give a whole number from 1 on")

    def fit(self, atoms: Atoms, algorithm: Algorithm1 | None) -> Fit:
        step = 2.0 ** -torch.arange(1.0, self.timesteps + 1)
        v0 = half_step(self.timesteps, self.v0, self.name)
        return Fit(neurons.fixed_steps(atoms.scale(), step, v0))

    def encode(self, x: Tensor, p: neurons.Params) -> neurons.Spikes:
        return neurons.step_encode(x, p, self.max_spikes)

    def table(self, p: neurons.Params) -> Tensor:
        return neurons.step_table(p)

    def quantise(self, x: Tensor, p: neurons.Params) -> tuple[Tensor, Tensor]:
        return neurons.step_quantise(x, p, self.max_spikes)
