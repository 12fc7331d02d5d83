"""Multi-granularity phase coding: n grains of steps, decoupled bases, fitted by Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from stages.codings.base import Fit, check_timesteps, half_step
from stages.errors import InputError
from stages.fits.algorithm1 import allocations, fit_bases
from stages.neurons import neurons
from stages.registry import register
from stages.statistics.statistics import RunningMaximum

if TYPE_CHECKING:
    from stages.distribution import Atoms
    from stages.fitting import Algorithm1


@register("coding/multigrain", was="stages.codings.multigrain.Multigrain")
@dataclass(frozen=True)
class Multigrain:
    """d(t) = B_g^-t with one output, reset and threshold base per grain g(t) (the paper's coding).

    Every allocation of steps to grains is fitted and the best one of each site taken. `v0` is zero or
    half of the last output weight, in fitting and evaluation alike. `tied` makes d = h = theta.
    `tau`: the scale is the largest magnitude of calibration (`maximum`) or the smoothed one of the
    paper's released code (`running_maximum`), which clips.
    """

    name: str = "multigrain"
    timesteps: int = 6
    grains: int = 2
    v0: str = "half_step"
    tied: bool = False
    tau: str = field(default="maximum", kw_only=True)

    trained = True
    neuron = True
    convention = "bit_plane"
    gate_comparisons = 0

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)
        half_step(self.timesteps, self.v0, self.name)
        if not isinstance(self.grains, int) or self.grains < 1:
            raise InputError(
                f"coding.grains={self.grains!r} for {self.name}: give a whole number of at least 1"
            )
        allocations(self.timesteps, self.grains)
        if self.tau not in ("maximum", "running_maximum"):
            raise InputError(
                f"coding.tau={self.tau!r} for {self.name}: choose maximum or running_maximum"
            )

    @property
    def statistics(self) -> tuple[RunningMaximum, ...]:
        """What the scale needs beyond the distribution."""
        return (RunningMaximum(),) if self.tau == "running_maximum" else ()

    @property
    def decode_macs(self) -> int:
        """Step weights are no powers of two, so every step's sum is multiplied by its own."""
        return self.timesteps

    def fit(self, atoms: Atoms, algorithm: Algorithm1 | None) -> Fit:
        if algorithm is None:
            raise InputError(f"{self.name} is trained: fitting.algorithm1 must be given")
        scale = atoms.maximum
        for statistic in self.statistics:
            scale = atoms.statistics[statistic.name]["maximum"]
        params, curve = fit_bases(
            atoms,
            allocations(self.timesteps, self.grains),
            scale=scale,
            grains=self.grains,
            tied=self.tied,
            half_step=self.v0 == "half_step",
            algorithm=algorithm,
        )
        return Fit(params, curve)

    def encode(self, x: Tensor, p: neurons.Params) -> neurons.Spikes:
        return neurons.step_encode(x, p)

    def table(self, p: neurons.Params) -> Tensor:
        return neurons.step_table(p)

    def quantise(self, x: Tensor, p: neurons.Params) -> tuple[Tensor, Tensor]:
        return neurons.step_quantise(x, p)
