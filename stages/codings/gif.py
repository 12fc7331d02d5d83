"""Generalised integrate-and-fire: increments of several levels, a range for every token (SpikeLLM)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Coding, check_timesteps
from stages.errors import InputError
from stages.fits.statistics import Saliency, Smoothing, Statistic
from stages.fitted import Fit
from stages.neurons.channels import per_channel
from stages.neurons.spikes import Params, Spikes, popcount
from stages.registry import register

CONVENTIONS = ("unary", "bit_plane")


@dataclass(frozen=True)
class Increments(Spikes):
    """A train of whole numbers 0..L-1, [T, *X]; scale and zero [*X] are those of the value's token.

    `sign` is 1 everywhere and `grain` marks salient channels. The value is (code - zero) * scale.
    """

    scale: Tensor
    zero: Tensor
    convention: str

    @property
    def code(self) -> Tensor:
        """The sum of the increments, [*X]."""
        return self.train.sum(0)

    @property
    def count(self) -> Tensor:
        """Spikes per value, [*X]: unit spikes, or one bits of every increment."""
        if self.convention == "unary":
            return self.train.sum(0)
        return popcount(self.train).sum(0)


@register("coding/gif", was="stages.codings.gif.Gif")
@dataclass(frozen=True)
class Gif(Coding):
    """An asymmetric quantiser with the minimum and maximum of every token, whose integer is emitted in
    increments of at most L - 1 (arXiv 2407.04752).

    Ordinary channels have L levels in one step, the `salient_fraction` of highest saliency
    T (L-1) + 1 levels in T steps, on the same range; in k and v salient channels have two steps
    whatever T is (one more bit, as in the paper). Mean steps are 1 + (T - 1) * salient_fraction. A
    token of q, k and v is one head's vector. The paper's T is a power of two, 2^addbit, and its
    released code simulates 2^(bits + addbit) levels; here the T - 1 levels that T increments cannot
    reach are left out. Probabilities stay dense as in the paper, which codes the inputs of the blocks'
    linear modules and q, k, v; here every other selected site is coded too. Its learned weight
    clipping is left out: weights are not quantised here, and nothing would be clipped.

    `convention` counts an increment as that many unit spikes (`unary`) or as its one bits
    (`bit_plane`). x = 0 has the code of the zero point and so spikes. `smoothing` divides channels
    before the code and multiplies after it, which leaves the weights as they are.
    """

    name: str = "gif"
    timesteps: int = 6
    levels: int = 16
    salient_fraction: float = 0.1
    convention: str = "unary"
    smoothing: Smoothing | None = None

    tokenwise = True
    dense_roles = ("attn.probs",)

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)
        if not isinstance(self.levels, int) or not 2 <= self.levels <= 256:
            raise InputError(f"coding.levels={self.levels!r}: give a whole number from 2 to 256")
        if not 0 <= self.salient_fraction <= 1:
            raise InputError(f"coding.salient_fraction={self.salient_fraction}: give 0 to 1")
        if self.convention not in CONVENTIONS:
            raise InputError(
                f"coding.convention={self.convention!r}: choose one of {', '.join(CONVENTIONS)}"
            )
        if self.smoothing is not None:
            self.smoothing.check(self)

    @property
    def salient(self) -> bool:
        """Whether any channel has more than one step."""
        return self.salient_fraction > 0 and self.timesteps > 1

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        saliency: tuple[Statistic, ...] = (Saliency(),) if self.salient else ()
        return saliency if self.smoothing is None else (*saliency, self.smoothing)

    @property
    def decode_macs(self) -> int:
        """An output needs scale * (sum - zero * row sum of the weights) for each group of channels."""
        return 4 if self.salient else 2

    def fit(self, atoms: Atoms) -> Fit:
        """Which channels are salient: the range itself is that of every token."""
        params = self.parameters(len(atoms.maximum), atoms.statistics)
        if self.smoothing is not None:
            params["smooth"] = atoms.statistics[self.smoothing.name]["scale"]
        return Fit(params)

    def parameters(
        self, sites: int, statistics: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """steps [sites] of salient channels, and which those are, salient [sites, C]."""
        steps = torch.full((sites,), float(self.timesteps))
        if not self.salient:
            return {"steps": steps, "salient": torch.zeros(sites, 1)}
        saliency = statistics[Saliency.name]
        steps = torch.where(saliency["operand"] > 0, steps.clamp(max=2), steps)
        score = saliency["score"]
        number = (score.isfinite().sum(-1, keepdim=True) * self.salient_fraction).round()
        rank = score.nan_to_num(nan=-torch.inf).argsort(-1, descending=True).argsort(-1)
        return {"steps": steps, "salient": (rank < number).float()}

    def code(
        self, x: Tensor, p: Params, rounding: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return code, zero point and scale of every value of x [..., C].

        scale = (max - min) / top and zero = round(-min / scale) over the token, with top the highest
        code of the channel; a token of equal values is exact.
        """
        x = x.float() / smooth(x, p)
        top = (self.levels - 1) * (1 + (p["steps"] - 1) * per_channel(p["salient"], x, 0.0))
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        same = torch.where(high == 0, 1.0, high.abs())
        scale = torch.where(high > low, (high - low) / top, same)
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        zero = rounding(-low / scale)
        code = torch.minimum((rounding(x / scale) + zero).clamp(min=0), top)
        return code, zero, scale

    def encode(self, x: Tensor, p: Params) -> Increments:
        """mem = code; k(t) = min(mem, L - 1); mem -= k(t), over T steps."""
        mem, zero, scale = self.code(x, p, torch.round)
        train = []
        for _ in range(self.timesteps):
            increment = mem.clamp(max=self.levels - 1)
            mem = mem - increment
            train.append(increment.int())
        one = torch.ones_like(mem, dtype=torch.int8)
        salient = per_channel(p["salient"], x, 0.0).expand(x.shape).long()
        scale = scale * smooth(x, p)
        return Increments(one, salient, torch.stack(train), scale, zero, self.convention)

    def table(self, p: Params) -> Tensor:
        """Every code in units of its token's scale, above the zero point, [*S, T (L-1) + 1]."""
        codes = torch.arange(self.timesteps * (self.levels - 1) + 1.0, device=p["steps"].device)
        return codes.expand(*p["steps"].shape, -1)

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        code, zero, scale = self.code(x, p, torch.round)
        return (code - zero) * scale * smooth(x, p), self._spikes(code)

    def value(self, x: Tensor, p: Params, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        """The value alone, differentiable if `rounding` is."""
        code, zero, scale = self.code(x, p, rounding)
        return (code - zero) * scale * smooth(x, p)

    def _spikes(self, code: Tensor) -> Tensor:
        if self.convention == "unary":
            return code
        whole = self.levels - 1
        full = (code / whole).floor()  # exact: code < 2^12
        return full * whole.bit_count() + popcount(code - full * whole)


def smooth(x: Tensor, p: Params) -> Tensor:
    """What every channel is divided by before the code and multiplied by after it."""
    return per_channel(p["smooth"], x, 1.0) if "smooth" in p else torch.ones((), device=x.device)
