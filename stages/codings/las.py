"""Base-2 phase coding with one range: LAS as the paper's tables use it, floored or rounded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Scaled, check_timesteps, half_step
from stages.fitted import Fit
from stages.neurons.bank import bank_encode, bank_quantise, bank_table
from stages.neurons.spikes import Params, Spikes
from stages.registry import register


@register("coding/las", was="stages.codings.las.Las")
@dataclass(frozen=True)
class Las(Scaled):
    """d(t) = h(t) = theta(t) = scale * 2^-t with scale the largest magnitude, or its quantile.

    v0=zero floors (LAS, the paper's un-optimised special case); v0=half_step rounds to nearest.
    Source: LAS, arXiv 2505.09659, base neuron.
    """

    name: str = "las"
    timesteps: int = 6
    v0: str = "zero"

    decode_macs = 1

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)
        half_step(self.timesteps, self.v0, self.name)
        self.check_scale()

    def fit(self, atoms: Atoms) -> Fit:
        return Fit({"scale": self.largest(atoms).float()[:, None]})

    def encode(self, x: Tensor, p: Params) -> Spikes:
        return bank_encode(x, p, self.timesteps, self._v0)

    def table(self, p: Params) -> Tensor:
        return bank_table(p, self.timesteps)

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        return bank_quantise(x, p, self.timesteps, self._v0)

    @property
    def _v0(self) -> float:
        return half_step(self.timesteps, self.v0, self.name)
