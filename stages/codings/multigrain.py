"""Multi-granularity phase coding: n grains of steps, decoupled bases, fitted by Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Scaled, check_timesteps, half_step
from stages.errors import InputError
from stages.fits.algorithm1 import Algorithm1, allocations, fit_bases
from stages.fits.statistics import RunningMaximum, Statistic
from stages.fitted import Fit
from stages.neurons.spikes import Params, Spikes
from stages.neurons.step import step_encode, step_quantise, step_table
from stages.registry import register


@register("coding/multigrain", was="stages.codings.multigrain.Multigrain")
@dataclass(frozen=True)
class Multigrain(Scaled):
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
    algorithm1: Algorithm1 = field(default=Algorithm1(), kw_only=True)

    trained = True

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)
        half_step(self.timesteps, self.v0, self.name)
        self.check_scale()
        if not isinstance(self.grains, int) or self.grains < 1:
            raise InputError(
                f"coding.grains={self.grains!r} for {self.name}: give a whole number of at least 1"
            )
        allocations(self.timesteps, self.grains)
        if not isinstance(self.algorithm1, Algorithm1):
            raise InputError(
                f"coding.algorithm1={self.algorithm1} for {self.name}, which is trained by it: give its "
                "settings, such as coding.algorithm1.rounds=4"
            )
        if self.tau not in ("maximum", "running_maximum"):
            raise InputError(
                f"coding.tau={self.tau!r} for {self.name}: choose maximum or running_maximum"
            )
        if self.tau == "running_maximum" and (self.channels or self.centred or self.quantile < 1):
            raise InputError(
                f"coding.tau=running_maximum for {self.name} is the scale of a site by itself: give "
                "coding.tau=maximum with coding.granularity=channel, coding.centre or coding.quantile"
            )
        if self.channels and self.algorithm1.slope_units == "absolute":
            raise InputError(
                f"coding.algorithm1.slope_units=absolute for {self.name} needs one scale a site: give "
                "relative, or coding.granularity=site"
            )

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What the scale needs beyond the distribution."""
        return (RunningMaximum(),) if self.tau == "running_maximum" else super().statistics

    @property
    def decode_macs(self) -> int:
        """Step weights are no powers of two, so the sum of every step is multiplied by its weight."""
        return self.timesteps

    def fit(self, atoms: Atoms) -> Fit:
        scale = self.largest(atoms)
        if self.tau == "running_maximum":
            scale = atoms.statistics[RunningMaximum.name]["maximum"]
        params, curve = fit_bases(
            atoms,
            allocations(self.timesteps, self.grains),
            scale=scale,
            grains=self.grains,
            tied=self.tied,
            half_step=self.v0 == "half_step",
            algorithm=self.algorithm1,
        )
        return Fit(params, curve)

    def encode(self, x: Tensor, p: Params) -> Spikes:
        return step_encode(x, p)

    def table(self, p: Params) -> Tensor:
        return step_table(p)

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        return step_quantise(x, p)
