"""Phase coding cut off after its first spikes: the SpikedAttention row as the paper's code runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Scaled, check_timesteps, half_step
from stages.errors import InputError
from stages.fitted import Fit
from stages.neurons.spikes import Params, Spikes
from stages.neurons.step import fixed_steps, step_encode, step_quantise, step_table
from stages.registry import register


@register("coding/two_spike", was="stages.codings.two_spike.TwoSpike")
@dataclass(frozen=True)
class TwoSpike(Scaled):
    """Base 2, scale the largest magnitude, at most `max_spikes` spikes a value: relative error, so
    more steps do not help beyond about 19 dB. Not trained."""

    name: str = "two_spike"
    timesteps: int = 6
    v0: str = "half_step"
    max_spikes: int = 2

    decode_macs = 1

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)
        half_step(self.timesteps, self.v0, self.name)
        self.check_scale()
        if not isinstance(self.max_spikes, int) or self.max_spikes < 1:
            raise InputError(f"coding.max_spikes={self.max_spikes}: give a whole number from 1 on")

    def fit(self, atoms: Atoms) -> Fit:
        step = 2.0 ** -torch.arange(1.0, self.timesteps + 1)
        v0 = half_step(self.timesteps, self.v0, self.name)
        return Fit(fixed_steps(self.largest(atoms).float(), step, v0))

    def encode(self, x: Tensor, p: Params) -> Spikes:
        return step_encode(x, p, self.max_spikes)

    def table(self, p: Params) -> Tensor:
        return step_table(p)

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        return step_quantise(x, p, self.max_spikes)
