"""Base-2 phase coding with one range: LAS as the paper's tables use it, floored or rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from stages.codings.base import Fit, check_timesteps, half_step
from stages.neurons import neurons
from stages.registry import register

if TYPE_CHECKING:
    from stages.distribution import Atoms
    from stages.fitting import Algorithm1


@register("coding/las", was="stages.codings.las.Las")
@dataclass(frozen=True)
class Las:
    """d(t) = h(t) = theta(t) = scale * 2^-t with scale the largest magnitude of the site.

    v0=zero floors (LAS, the paper's un-optimised special case); v0=half_step rounds to nearest.
    Source: LAS, arXiv 2505.09659, base neuron.
    """

    name: str = "las"
    timesteps: int = 6
    v0: str = "zero"

    grains = 1
    trained = False
    neuron = True
    convention = "bit_plane"
    decode_macs = 1
    gate_comparisons = 0

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)
        half_step(self.timesteps, self.v0, self.name)

    def fit(self, atoms: Atoms, algorithm: Algorithm1 | None) -> Fit:
        return Fit({"scale": atoms.scale()[:, None]})

    def encode(self, x: Tensor, p: neurons.Params) -> neurons.Spikes:
        return neurons.bank_encode(x, p, self.timesteps, self._v0)

    def table(self, p: neurons.Params) -> Tensor:
        return neurons.bank_table(p, self.timesteps)

    def quantise(self, x: Tensor, p: neurons.Params) -> tuple[Tensor, Tensor]:
        return neurons.bank_quantise(x, p, self.timesteps, self._v0)

    @property
    def _v0(self) -> float:
        return half_step(self.timesteps, self.v0, self.name)
