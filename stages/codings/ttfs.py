"""Time to first spike: one spike a value, the earlier the larger, over a signed interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Coding
from stages.errors import InputError
from stages.fitted import Fit
from stages.neurons.spikes import Params, SpikeTime
from stages.registry import register

LONGEST_WINDOW = 4096


@register("coding/ttfs", was="stages.codings.ttfs.Ttfs")
@dataclass(frozen=True)
class Ttfs(Coding):
    """A linear latency code of the interval [a, b]: t = clip(round((b - x) / δ), 0, T - 1) is decoded
    as b - t δ with δ = (b - a) / (T - 1): T levels for both signs, no sign plane.

    [a, b] are a site's extremes, or with `percentile` that percentile of |x| where it is nearer, and
    always hold 0: a masked attention weight or an unused channel is 0 and has to stay it, which an
    interval beside 0 would shift by its near end. Probabilities get [0, max], where 0 is exact; in
    an interval of both signs 0 is off by half a step at most. `silent_zero` makes the level next to
    0 the one without a spike (for a neuron whose time is counted from that level's, so that silence
    adds nothing); without it every value costs exactly one spike.

    A linear layer is Σ w (b - t δ) = b Σ w - δ Σ w t: the first term is known beforehand, Σ w t is the
    running sum of the weights that arrived, and δ is the one multiplication of an accumulator. The T
    potential updates of a window are not counted. Not trained.
    Source: TTFSFormer (ICML 2025) with ideal kernels at time precision T.
    """

    name: str = "ttfs"
    timesteps: int = 128
    percentile: float | None = None
    silent_zero: bool = False

    convention = "one_spike"
    decode_macs = 1

    def __post_init__(self) -> None:
        if not isinstance(self.timesteps, int) or not 2 <= self.timesteps <= LONGEST_WINDOW:
            raise InputError(
                f"coding.timesteps={self.timesteps!r} for {self.name}: give a whole number from 2 "
                f"(one level codes nothing) to {LONGEST_WINDOW}"
            )
        if self.percentile is not None and not 50 <= self.percentile < 100:
            raise InputError(
                f"coding.percentile={self.percentile} for {self.name}: give 50 up to below 100, or "
                "null for the extremes"
            )

    def fit(self, atoms: Atoms) -> Fit:
        low, high = (end.double() for end in atoms.range())
        if self.percentile is not None:
            limit = atoms.quantile(self.percentile / 100)
            # A site that is zero almost everywhere keeps its extremes.
            limit = torch.where(limit > 0, limit, torch.inf)
            low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
        low, high = low.clamp(max=0), high.clamp(min=0)
        step = (high - low) / (self.timesteps - 1)
        return Fit({"origin": (high / step).float(), "step": step.float()})

    def encode(self, x: Tensor, p: Params) -> SpikeTime:
        """Fires once, when the threshold, falling by δ a step, is no more than δ / 2 above the value:
        p: origin [] = b / δ, the time of the value 0; step [] = δ."""
        wait = p["origin"] - x.float() / p["step"]
        time = torch.full_like(
            wait, self.timesteps - 1, dtype=torch.long
        )  # fires at the end at last
        waiting = torch.ones_like(wait, dtype=torch.bool)
        for t in range(self.timesteps):
            fires = waiting & (wait <= t + 0.5)
            time = torch.where(fires, t, time)
            waiting = waiting & ~fires
        if self.silent_zero:
            time = torch.where(time == _zero_time(p["origin"]), self.timesteps, time)
        return SpikeTime(torch.ones_like(time, dtype=torch.int8), time, self.timesteps)

    def table(self, p: Params) -> Tensor:
        """Signed value of every spike time, silence last, [*S, T + 1]."""
        origin, step = p["origin"][..., None], p["step"][..., None]
        time = torch.arange(self.timesteps, dtype=torch.float32, device=step.device)
        silent = _zero_time(origin) if self.silent_zero else origin
        time = torch.cat([time.expand(*step.shape[:-1], -1), silent], -1)
        return (origin - time) * step

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Closed form of `encode`. Exact: the subtraction of a half is, wherever it decides."""
        origin, step = p["origin"][..., None], p["step"][..., None]
        wait = origin - x.float() / step
        time = torch.clamp(torch.ceil(wait - 0.5), 0, self.timesteps - 1)
        value = (origin - time) * step
        if self.silent_zero:
            return value, (time != _zero_time(origin)).to(value.dtype)
        return value, torch.ones_like(value)


def _zero_time(origin: Tensor) -> Tensor:
    """The spike time of the value 0, as a float."""
    return torch.ceil(origin - 0.5)
