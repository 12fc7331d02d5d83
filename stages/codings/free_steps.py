"""The few-spikes neuron: every step has its own output, reset and threshold weight."""

from __future__ import annotations

from dataclasses import dataclass

from stages.codings.multigrain import Multigrain
from stages.errors import InputError
from stages.registry import register


@register("coding/free_steps", was="stages.codings.free_steps.FreeSteps")
@dataclass(frozen=True)
class FreeSteps(Multigrain):
    """The n = T limit of multi-granularity coding, where a base per step is a free weight per step.

    Sign-magnitude and started at base 2, fitted by Algorithm 1 like the other trained codings.
    Source: FS neurons, Stöckl & Maass, Nature Machine Intelligence 2021.
    """

    name: str = "free_steps"
    grains: int = 0  # as many as steps

    def __post_init__(self) -> None:
        if self.grains == 0:
            object.__setattr__(self, "grains", self.timesteps)
        super().__post_init__()
        if self.grains != self.timesteps:
            raise InputError(
                f"free_steps has a grain for every step: got coding.grains={self.grains}, "
                f"coding.timesteps={self.timesteps}; leave coding.grains as it is in the yaml"
            )
