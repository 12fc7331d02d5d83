"""One-spike coding: log-spaced levels, at most one spike a value (SpikedAttention, One-Spike SNN)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Coding
from stages.errors import InputError
from stages.fits.quantiser import running
from stages.fitted import Fit
from stages.neurons.spikes import Params, SpikeTime
from stages.registry import register

LONGEST_WINDOW = 64
BASES = (1.005, 16.0)  # searched between these
GRID, FINER, ROUNDS = 256, 17, 4


@register("coding/one_spike", was="stages.codings.one_spike.OneSpike")
@dataclass(frozen=True)
class OneSpike(Coding):
    """Magnitudes M B^-t, t = 0 … T - 1, and zero; M is the largest. The spike comes at the first t
    with |x| >= M B^-t (1 + 1/B) / 2, the midpoint to the next level.

    `base` null finds each site's B of least expected squared error; at least T = 16 with B ~ 1.4 are
    needed for 20 dB. Not trained. The levels are no powers of two, so the sum of every step is
    multiplied by 1/B once, T multiplications an accumulator.

    Attention probabilities are not coded but computed as spikes (`softmax`). Its base is that of the
    site too: the same B, chosen for steps against range on the probabilities below their largest
    value M, then codes them below the winner of each row. The neuron of the site serves the fit only.
    Source: SpikedAttention; the product of two coded operands that its traces compute step by step is
    the product of the decoded values.
    """

    name: str = "one_spike"
    timesteps: int = 6
    base: float | None = None

    convention = "one_spike"

    def __post_init__(self) -> None:
        if not isinstance(self.timesteps, int) or not 1 <= self.timesteps <= LONGEST_WINDOW:
            raise InputError(
                f"coding.timesteps={self.timesteps!r} for {self.name}: give a whole number from 1 to "
                f"{LONGEST_WINDOW}"
            )
        if self.base is not None and not self.base > 1:
            raise InputError(
                f"coding.base={self.base} for {self.name}: give a number above 1, or null for the "
                "best of each site"
            )

    @property
    def decode_macs(self) -> int:
        return self.timesteps

    def fit(self, atoms: Atoms) -> Fit:
        given = self.base
        base = (
            best_base(atoms, self.timesteps)
            if given is None
            else torch.full_like(atoms.maximum, given)
        )
        level = atoms.maximum[:, None] * _weights(base, self.timesteps).flip(-1)
        threshold = level * (1 + 1 / base[:, None]) / 2
        levels = torch.nn.functional.pad(level, (1, 0)).float()  # ascending, silence first
        return Fit({"levels": levels, "thresholds": threshold.float(), "base": base.float()})

    def encode(self, x: Tensor, p: Params) -> SpikeTime:
        """The neuron of one site, blocked after its spike: levels [T + 1], thresholds [T].

        Its threshold falls to 1/B a step. The membrane that SpikedAttention multiplies by B instead
        would round at every step.
        """
        magnitude = x.float().abs()
        time = torch.full_like(magnitude, self.timesteps, dtype=torch.long)
        for t, threshold in enumerate(p["thresholds"].flip(-1)):
            fires = (time == self.timesteps) & (magnitude >= threshold)
            time = torch.where(fires, t, time)
        return SpikeTime(x.sign().to(torch.int8), time, self.timesteps)

    def table(self, p: Params) -> Tensor:
        """Magnitude of every spike time, silence last, [*S, T + 1]."""
        return p["levels"].flip(-1)

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """The level of the highest threshold reached, unrolled: fused, this beats a table look-up."""
        magnitude = x.float().abs()
        level = torch.zeros_like(magnitude)
        for t in range(self.timesteps):
            reached = magnitude >= p["thresholds"][..., t, None]
            level = torch.where(reached, p["levels"][..., t + 1, None], level)
        fires = magnitude >= p["thresholds"][..., :1]
        return torch.sign(x).float() * level, fires.float()

    def softmax(
        self, scores: Tensor, scaling: float, mask: Tensor, p: Params
    ) -> tuple[Tensor, Tensor]:
        """The winner-oriented spike-shift softmax: a key spikes k = round((max - x) / ln B) steps
        after its row's winner with weight B^-k, if at all (k < T), and the weights are divided by
        their sum. x = scores * scaling; a row without an allowed key is zero.
        """
        step, spikes = self._shifted(scores, scaling, mask, p)
        weight = spikes * torch.exp(-step * p["base"].log())
        # The winner weighs 1, so a smaller sum is that of a row without a key.
        return weight / weight.sum(-1, keepdim=True).clamp(min=1), spikes

    def softmax_spikes(
        self, scores: Tensor, scaling: float, mask: Tensor, p: Params
    ) -> tuple[SpikeTime, Tensor, Tensor]:
        """The same as spikes: when each key fires, the weights B^-k [T], and one over their sums."""
        step, spikes = self._shifted(scores, scaling, mask, p)
        weight = torch.exp(-torch.arange(self.timesteps, device=step.device) * p["base"].log())
        time = torch.where(spikes > 0, step, self.timesteps).long()
        total = (spikes * weight[step.long().clamp(max=self.timesteps - 1)]).sum(-1, keepdim=True)
        fired = SpikeTime(spikes.to(torch.int8), time, self.timesteps)
        return fired, weight, 1 / total.clamp(min=1)

    def _shifted(
        self, scores: Tensor, scaling: float, mask: Tensor, p: Params
    ) -> tuple[Tensor, Tensor]:
        """Steps behind the winner of the row, at most T, and whether a key fires, in float32."""
        x = torch.where(mask, scores.float() * scaling, torch.finfo(torch.float32).min)
        step = torch.round((x.amax(-1, keepdim=True) - x) / p["base"].log())
        return step.clamp(max=self.timesteps), (mask & (step < self.timesteps)).float()


def _weights(base: Tensor, timesteps: int) -> Tensor:
    """B^-t of bases [*S], [*S, T]."""
    return base[..., None] ** -torch.arange(timesteps, dtype=base.dtype)


def best_base(atoms: Atoms, timesteps: int) -> Tensor:
    """The base of least expected squared error of every site, [sites] float64: a grid even in
    log(B - 1), refined around its best."""
    x, weight = atoms.points()
    order = x.sort(-1)
    x, weight = order.values, weight.gather(-1, order.indices)
    sums = tuple(running(weight * x**k) for k in range(3))
    low, high = (math.log(base - 1) for base in BASES)
    span, size = (high - low) / 2, GRID
    best = torch.full((len(x), 1), (low + high) / 2, dtype=torch.float64)
    for _ in range(ROUNDS + 1):
        place = best + span * torch.linspace(-1, 1, size, dtype=torch.float64)
        place = place.clamp(low, high)
        error = torch.stack(
            [_error(x, sums, atoms.maximum, 1 + b.exp(), timesteps) for b in place.T], -1
        )
        best = place.gather(-1, error.argmin(-1, keepdim=True))
        span, size = 2 * span / (size - 1), FINER
    return 1 + best.squeeze(-1).exp()


def _error(
    x: Tensor, sums: tuple[Tensor, ...], maximum: Tensor, base: Tensor, timesteps: int
) -> Tensor:
    """Expected squared error of x [sites, K] ascending under a base [sites], from its running sums
    of mass, mass x and mass x^2."""
    level = maximum[:, None] * _weights(base, timesteps).flip(-1)
    threshold = level * (1 + 1 / base[:, None]) / 2
    cut = torch.nn.functional.pad(torch.searchsorted(x, threshold), (1, 0))
    cut = torch.nn.functional.pad(cut, (0, 1), value=x.shape[1])
    mass, first, second = (total.gather(-1, cut).diff() for total in sums)
    level = torch.nn.functional.pad(level, (1, 0))
    return (second - 2 * level * first + level**2 * mass).sum(-1)
