"""Classic phase coding with one learnable base, tied in output, reset and threshold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stages.codings.multigrain import Multigrain
from stages.errors import InputError
from stages.neurons.spikes import Params, Spikes
from stages.neurons.step import step_encode, step_quantise
from stages.registry import register


@register("coding/phase", was="stages.codings.phase.Phase")
@dataclass(frozen=True)
class Phase(Multigrain):
    """d(t) = h(t) = theta(t) = B^-t (Kim et al. 2018, one period); at most `max_spikes` spikes a value
    if given, after which the neuron stays silent."""

    name: str = "phase"
    grains: int = 1
    tied: bool = True
    max_spikes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grains != 1 or not self.tied:
            raise InputError("phase has one tied base: choose coding=multigrain for more")
        if self.max_spikes is not None and self.max_spikes < 1:
            raise InputError(f"coding.max_spikes={self.max_spikes}: give at least 1, or null")

    def encode(self, x: Tensor, p: Params) -> Spikes:
        return step_encode(x, p, self.max_spikes)

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        return step_quantise(x, p, self.max_spikes)
