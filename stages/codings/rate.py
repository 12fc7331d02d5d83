"""Rate coding: an integrate-and-fire neuron with soft reset that drains one injected charge."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Scaled, check_timesteps
from stages.errors import InputError
from stages.fitted import Fit
from stages.neurons.spikes import Counts, Params
from stages.neurons.step import fixed_steps, step_encode, step_quantise
from stages.registry import register

LONGEST_WINDOW = 64
V0 = {"zero": 0.0, "half_step": 0.5}  # in units of the threshold


@register("coding/rate", was="stages.codings.rate.Rate")
@dataclass(frozen=True)
class Rate(Scaled):
    """Every step weighs scale / `levels` (null: T): T + 1 evenly spaced magnitudes, n spikes for the n-th
    (unary). Fewer levels than steps reach beyond the scale, up to T / levels of it.

    `v0` zero floors, half_step rounds. Not trained; scale is the largest magnitude, or its `quantile`.
    With `granularity` channel it is the signed integrate-and-fire neuron with a threshold a channel
    (spikingjelly's Qwen2 recipe: T = 32, 16 levels, a high quantile).
    """

    name: str = "rate"
    timesteps: int = 6
    v0: str = "half_step"
    levels: int | None = field(default=None, kw_only=True)

    convention = "unary"
    decode_macs = 1  # one weight for all steps

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps, most=LONGEST_WINDOW)
        self.check_scale()
        if self.v0 not in V0:
            raise InputError(f"coding.v0={self.v0!r} for {self.name}: choose {' or '.join(V0)}")
        if self.levels is not None and not 1 <= self.levels <= self.timesteps:
            raise InputError(
                f"coding.levels={self.levels} for {self.name}: give 1 to the number of timesteps "
                f"({self.timesteps}), or null for as many"
            )

    def fit(self, atoms: Atoms) -> Fit:
        step = torch.full((self.timesteps,), 1 / (self.levels or self.timesteps))
        v0 = float(step[-1]) * V0[self.v0]
        return Fit(fixed_steps(self.largest(atoms).float(), step, v0))

    def encode(self, x: Tensor, p: Params) -> Counts:
        spikes = step_encode(x, p)
        return Counts(spikes.sign, spikes.grain, spikes.train)

    def table(self, p: Params) -> Tensor:
        """Magnitude of every number of spikes, [*S, T + 1], summed one by one."""
        level = torch.zeros_like(p["scale"])
        levels = [level]
        for d in p["d"].unbind(-1):
            level = level + d
            levels.append(level)
        return torch.stack(levels, -1) * p["scale"][..., None]

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        return step_quantise(x, p)
