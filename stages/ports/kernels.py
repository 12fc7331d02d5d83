"""The fast path of a coding as compiled kernels: one pass over memory, spikes summed on the way.

Where there is no compiler the same expression runs eagerly, see `stages.compiler`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from stages.codings.base import Coding
from stages.compiler import fused
from stages.neurons.channels import centre, unit, unscaled
from stages.neurons.selection import normalised, readable
from stages.neurons.spikes import Params

# Below this many values a call is too short to repay a compiled kernel's guards, and single-token
# shapes would be specialised one by one.
EAGER_BELOW = 1 << 14

# Spikes that are not counted may be any tensor.
RowKernel = Callable[[Tensor, Params], tuple[Tensor, Tensor]]
SoftmaxKernel = Callable[[Tensor, float, Tensor, Params], tuple[Tensor, Tensor]]


def masked_softmax(scores: Tensor, scaling: float, mask: Tensor) -> Tensor:
    """Compute softmax(scores * scaling) over the allowed keys, in float32; exactly zero elsewhere.

    scores [B, H, Q, K], mask [B, 1, Q, K] bool.
    """
    lowest = torch.finfo(torch.float32).min
    return torch.where(mask, scores.float() * scaling, lowest).softmax(-1)


def coded_rows(
    quantise: Callable[[Tensor, Params], tuple[Tensor, Tensor]],
    counted: bool,
    x: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    p: Params,
) -> tuple[Tensor, Tensor]:
    """The code of x about its means and in units of its scales, and the spikes of every row."""
    u = x if mean is None else x.float() - mean
    if scale is None:
        value, spikes = quantise(u, p)
    else:
        value, spikes = quantise(u.float() / scale, p)
        value = value * scale
    if mean is not None and mean.dim() == 1:
        value = value + mean
    return value.to(x.dtype), spikes.sum(-1) if counted else spikes.new_empty(0)


@functools.lru_cache(maxsize=64)
def row_kernel(coding: Coding, counted: bool) -> RowKernel:
    """Make (x [..., C], parameters) -> (coded x, spikes of every row [...] or an empty tensor).

    Heads [B, H, S, D] are coded without their means, see `stages.neurons.channels.left_out`.
    """

    def kernel(
        x: Tensor, scale: Tensor | None, mean: Tensor | None, p: Params
    ) -> tuple[Tensor, Tensor]:
        return coded_rows(coding.quantise, counted, x, scale, mean, p)

    if coding.tokenwise and not coding.rowwise:  # its layout is part of the code
        return lambda x, p: kernel(x, None, None, p)
    fast = fused(kernel, one_pass=True)

    def call(x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        scale, mean = unit(x, p), centre(x, p)
        # Heads have scales and means of their own, so they stay apart.
        heads = any(each is not None and each.dim() == 3 for each in (scale, mean))
        flat = x.contiguous() if heads else x.reshape(-1, x.shape[-1])
        made = fast if x.numel() >= EAGER_BELOW else kernel
        value, spikes = made(flat, scale, mean, unscaled(p))
        return value.view(x.shape), spikes

    return call


def softmax(scores: Tensor, scaling: float, bias: Tensor) -> Tensor:
    """The softmax in float32, whose exponentials pass through the memory of the scores where they can."""
    logits = scores.float() * scaling + bias
    power = torch.exp(logits - logits.amax(-1, keepdim=True))
    if scores.dtype == torch.float32:
        power = scores.copy_(power)
    return power / power.sum(-1, keepdim=True)


def _in_place(scores: Tensor, scaling: float, bias: Tensor) -> Tensor:
    return _put(softmax(scores, scaling, bias), scores)


def _put(value: Tensor, scores: Tensor) -> Tensor:
    """The value where the scores stand; beside them of one head, whose softmax Inductor does not
    compile in place (findings/inductor_softmax_in_place.sh)."""
    return value.to(scores.dtype) if scores.shape[1] == 1 else scores.copy_(value)


_dense_softmax = fused(_in_place)


def dense_softmax(scores: Tensor, scaling: float, bias: Tensor) -> Tensor:
    """Probabilities of scores [B, H, Q, K], as a rule in their place; bias as of `softmax_kernel`."""
    if readable(scores, bias) and normalised(scores, scaling, bias):
        return scores
    made = _in_place if scores.numel() < EAGER_BELOW else _dense_softmax
    probs: Tensor = made(scores, scaling, bias)
    return probs


@functools.lru_cache(maxsize=64)
def softmax_kernel(coding: Coding, counted: bool) -> SoftmaxKernel:
    """Make (scores [B, H, Q, K], scaling, bias, parameters) -> (coded probabilities, spikes [B, H, Q]).

    The probabilities stand where the scores stood, as a rule. bias [B, 1, Q, K] float32 is 0, or the
    lowest number where a query does not see a key: a sum is read in a third of the time that a boolean
    takes.
    """

    def probabilities(
        scores: Tensor, scaling: float, bias: Tensor, p: Params
    ) -> tuple[Tensor, Tensor]:
        if coding.replaces_softmax:
            return coding.softmax(scores, scaling, bias == 0, p)
        return coding.quantise(softmax(scores, scaling, bias), p)

    def kernel(scores: Tensor, scaling: float, bias: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        value, spikes = probabilities(scores, scaling, bias, p)
        # A fitted threshold may lie below v0, and such a neuron would fire at masked zeros.
        seen = torch.where(bias == 0, spikes, 0).sum(-1) if counted else spikes.new_empty(0)
        return _put(value, scores), seen

    fast = fused(kernel, one_pass=True)

    def call(scores: Tensor, scaling: float, bias: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        small = scores.numel() < EAGER_BELOW or scores.shape[2] == 1
        coded: tuple[Tensor, Tensor] = (kernel if small else fast)(scores, scaling, bias, p)
        return coded

    return call
