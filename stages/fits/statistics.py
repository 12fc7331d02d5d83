"""What a fit may need to know of the dense model beyond the distribution of its values.

A statistic is declared here, as the settings that determine it, and measured by the function of
`stages.statistics` that is registered for its class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.errors import InputError
from stages.registry import register

MULTIPLICATION = 4.6 / 0.9  # additions that cost as much: picojoules in 45 nm logic (Horowitz 2014)
# Where coding x - m costs a constant: W m is a bias of linear layers, the means of k shift all scores of
# a query alike, and those of v are added once, as probabilities sum to one.
CENTRED = ("attn.in", "attn.k", "attn.v", "attn.out", "mlp.in", "mlp.down", "head.in")


class Statistic:
    """A measurement on calibration text, a frozen dataclass registered by `@register("statistic/...")`;
    an artifact by itself, tensors with the dimension of the sites first."""

    name: str
    whole_model: bool = False  # whether it is measured on a model that is in memory as a whole

    @property
    def least_windows(self) -> int:
        """Calibration windows that it reads at least."""
        return 1

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Statistics whose tensors its measurement reads."""
        return ()

    def reads(self, windows: int, batch: int) -> tuple[int, int]:
        """Of so many windows those that it reads, and how many of them make a batch."""
        return windows, batch


@register("statistic/running_maximum", was="stages.llm.statistics.RunningMaximum")
@dataclass(frozen=True)
class RunningMaximum(Statistic):
    """The smoothed range of the paper's released code: tau of a site is the maximum over channels of
    an exponential moving average, over windows, of the channel's largest |x| in a window.

    The first window starts the average; `momentum` is the share of the old one. A channel is a
    feature, in q, k and v a head's dimension, in the probabilities a head. Below the true maximum, so
    that a coding with this scale clips.
    """

    momentum: float = 0.99

    name = "running_maximum"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InputError(
                f"running maximum: momentum={self.momentum}: give a share from 0 to below 1"
            )


@register("statistic/channel_means")
@dataclass(frozen=True)
class ChannelMeans(Statistic):
    """The mean m of every channel over calibration, at sites of the roles `CENTRED` but those of experts,
    which see few tokens each. A channel is a feature, in k and v a head's dimension."""

    name = "channel_means"


@register("statistic/channel_scales")
@dataclass(frozen=True)
class ChannelScales(Statistic):
    """The scale s of every channel, the `quantile` of its |x| over calibration (1: the maximum), at sites
    of `roles` of its |x - m| with the means of `ChannelMeans`.

    A channel is a feature, in q, k and v a head's dimension; probabilities have none. The quantile is
    exact: the smallest magnitude that at least this share of the tokens does not exceed. Where it is
    zero the channel's maximum takes its place, and in a channel that is zero throughout the largest
    scale of the site.
    """

    quantile: float = 1.0
    roles: tuple[str, ...] = ()

    name = "channel_scales"

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(self.roles))
        if not 0 < self.quantile <= 1:
            raise InputError(f"channel scale: quantile={self.quantile}: give above 0 up to 1")

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (ChannelMeans(),) if self.roles else ()

    def kept(self, tokens: int) -> int:
        """How many of the largest magnitudes of so many tokens end with the quantile."""
        return tokens - math.ceil(self.quantile * tokens * (1 - 1e-12)) + 1


@register("statistic/channel_scale")
@dataclass(frozen=True)
class ChannelScale(Statistic):
    """The scale s of every channel, see `ChannelScales`, and the distribution of x / s at every site."""

    quantile: float = 1.0

    name = "channel_scale"

    def __post_init__(self) -> None:
        self.scales(())

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (self.scales(()),)

    def scales(self, roles: tuple[str, ...]) -> ChannelScales:
        """Those of its quantile, about the means of `roles`. Raises InputError for no quantile."""
        return ChannelScales(self.quantile, roles)


@register("statistic/products")
@dataclass(frozen=True)
class Products(Statistic):
    """The multiplications that the values of a site enter a token, and the sums they are added up in:
    macs, accumulators [S] float64, in windows of the length of the calibration text's, of which a query
    sees what stands before it. Their ratio is the width of the product: the inputs of a linear layer, the
    dimension of a head for q and k, the mean number of keys for probabilities and v; zeros where a value
    enters an element-wise product alone. Experts share what a token meets of them equally."""

    name = "products"


def widths(size: Mapping[str, Tensor]) -> Tensor:
    """The width of the product that the values of every site enter, [S]: `Products`; 0 without one."""
    sums = size["accumulators"]
    return torch.where(sums > 0, size["macs"] / sums.clamp(min=1e-300), 0.0)


@register("statistic/channel_mean")
@dataclass(frozen=True)
class ChannelMean(Statistic):
    """The mean m of every channel over calibration, and the distribution of x - m at every site.

    A channel is a feature, in k and v a head's dimension. The mean is zero but at sites of `roles`, of
    which those that `CENTRED` lacks would cost more than a constant: q, the probabilities and the two
    factors of a gated product. It is zero in experts, which see few tokens each. With `scale` the
    distribution is that of (x - m) / s with the scales s of |x - m|, of every site that has channels.
    """

    roles: tuple[str, ...] = CENTRED
    scale: ChannelScale | None = None

    name = "channel_mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(self.roles))
        unknown = [role for role in self.roles if role not in CENTRED]
        if unknown:
            raise InputError(
                f"channel mean: roles={list(self.roles)}: give some of {', '.join(CENTRED)}"
            )

    @property
    def needs(self) -> tuple[Statistic, ...]:
        scales = () if self.scale is None else (self.scale.scales(self.roles),)
        return (ChannelMeans(), *scales)


@register("statistic/saliency", was="stages.llm.statistics.Saliency")
@dataclass(frozen=True)
class Saliency(Statistic):
    """How much the channels of a site weigh in the product they enter (SpikeLLM, arXiv 2407.04752,
    "optimal brain spiking"): signed, a mean over tokens and windows.

    A linear site with input X [tokens, C] and the weights W [out, C] of all its consumers scores
    X o (X W^T W). K scores K o (K Q^T Q), with Q of all query heads that read the key head, and V
    scores V o (P^T P V) likewise; a channel is then a key head's dimension. Q^T Q is taken over the
    whole window without the causal mask. Sites that feed no product with weights, q and the
    probabilities have no score.
    """

    name = "saliency"


@register("statistic/smoothing", was="stages.llm.smoothing.Smoothing")
@dataclass(frozen=True)
class Smoothing(Statistic):
    """The learnable equivalent transform of OmniQuant and SpikeLLM, applied and undone around the code
    so that weights stay as they are: x becomes s * Q(x / s) with s per channel.

    s of attn.in, attn.out and mlp.in starts at max|x|^alpha / max|w|^(1 - alpha); v shares that of
    attn.out, which is its product with probabilities; q and k share one that starts at 1 and enters
    k inversely (q k is unchanged). Adam with `lr` on log s, `epochs` times over the first `windows`
    calibration windows, one window a step, block after block: the squared error between the block
    with coded inputs, behind the coded blocks before it, and the dense block behind the dense ones.
    Rounding is passed straight through. The last s is kept. `timesteps`, `levels` and
    `salient_fraction` are those of the coding; the paper takes 128 windows of 2048 tokens.
    """

    epochs: int
    windows: int
    lr: float
    alpha: float
    timesteps: int
    levels: int
    salient_fraction: float

    name = "smoothing"
    whole_model = True

    def __post_init__(self) -> None:
        if min(self.epochs, self.windows) < 1 or self.lr <= 0 or not 0 <= self.alpha <= 1:
            raise InputError(
                f"coding.smoothing: got epochs={self.epochs}, windows={self.windows}, lr={self.lr}, "
                f"alpha={self.alpha}; needs 1 epoch and window at least, lr above 0, alpha 0 to 1"
            )

    @property
    def least_windows(self) -> int:
        return self.windows

    def reads(self, windows: int, batch: int) -> tuple[int, int]:
        return self.windows, 1

    def check(self, coding: Any) -> None:
        """Raise InputError unless it is learned for this coding (`gif`)."""
        for name in ("timesteps", "levels", "salient_fraction"):
            if getattr(self, name) != getattr(coding, name):
                raise InputError(
                    f"coding.smoothing.{name}={getattr(self, name)} but coding.{name}="
                    f"{getattr(coding, name)}: leave it at ${{..{name}}}"
                )
