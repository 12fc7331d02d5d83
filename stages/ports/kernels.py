"""The fast path of a coding as compiled kernels: one pass over memory, spikes summed on the way.

torch.compile turns the coding's elementwise `quantise` into C++ on a CPU and Triton on a GPU.
Without a working compiler the same expression runs eagerly; `compiled()` says which it was.
"""

from __future__ import annotations

import functools
import logging
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.codings.base import Coding
from stages.neurons.spikes import Params

log = logging.getLogger(__name__)

# Below this many values a call is too short to repay a compiled kernel's guards, and single-token
# shapes would be specialised one by one.
EAGER_BELOW = 1 << 14

RowKernel = Callable[[Tensor, Params], tuple[Tensor, Tensor]]
SoftmaxKernel = Callable[[Tensor, float, Tensor, Params], tuple[Tensor, Tensor]]


class _Compiler:
    """Whether this process compiles, and its first failure."""

    enabled = True
    failure: str | None = None


def use_compiler(enabled: bool, cache: Path | None = None) -> None:
    """Turns compilation on or off for this process; `cache` keeps compiled kernels on disk."""
    _Compiler.enabled = enabled
    if cache is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def compiled() -> bool:
    """Whether all kernels are compiled, none eager."""
    return _Compiler.enabled and _Compiler.failure is None


def masked_softmax(scores: Tensor, scaling: float, mask: Tensor) -> Tensor:
    """softmax(scores * scaling) over the allowed keys, in float32; exactly zero elsewhere.

    scores [B, H, Q, K], mask [B, 1, Q, K] bool.
    """
    lowest = torch.finfo(torch.float32).min
    return torch.where(mask, scores.float() * scaling, lowest).softmax(-1)


@functools.lru_cache(maxsize=64)
def row_kernel(coding: Coding, counted: bool) -> RowKernel:
    """(x [..., C], parameters) -> (coded x, spikes of every row [...] or an empty tensor)."""

    def kernel(x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        value, spikes = coding.quantise(x, p)
        return value.to(x.dtype), spikes.sum(-1) if counted else spikes.new_empty(0)

    if coding.tokenwise:
        return kernel  # its layout is part of the code, and it is no elementwise expression
    fast = fused(kernel)

    def call(x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        value, spikes = (fast if x.numel() >= EAGER_BELOW else kernel)(flat, p)
        return value.view(x.shape), spikes

    return call


@functools.lru_cache(maxsize=64)
def softmax_kernel(coding: Coding, counted: bool) -> SoftmaxKernel:
    """(scores [B, H, Q, K], scaling, mask, parameters) -> (coded probabilities, spikes [B, H, Q])."""

    def probabilities(
        scores: Tensor, scaling: float, mask: Tensor, p: Params
    ) -> tuple[Tensor, Tensor]:
        if coding.replaces_softmax:
            return coding.softmax(scores, scaling, mask, p)
        return coding.quantise(masked_softmax(scores, scaling, mask), p)

    def kernel(scores: Tensor, scaling: float, mask: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        value, spikes = probabilities(scores, scaling, mask, p)
        # A fitted threshold may lie below v0, and such a neuron would fire at masked zeros.
        seen = (spikes * mask).sum(-1) if counted else spikes.new_empty(0)
        return value.to(scores.dtype), seen

    fast = fused(kernel)

    def call(scores: Tensor, scaling: float, mask: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        small = scores.numel() < EAGER_BELOW or scores.shape[2] == 1
        return (kernel if small else fast)(scores, scaling, mask, p)

    return call


def fused(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` compiled for all shapes, or itself once the compiler has failed at it."""
    # Compilations are counted per code object, and all codings share the code of one closure; a
    # code object of its own keeps one coding from using up the others'.
    own = types.FunctionType(
        kernel.__code__.replace(), kernel.__globals__, kernel.__name__, None, kernel.__closure__
    )
    fast = torch.compile(own, dynamic=True)
    broken = False

    def call(*args: Any) -> Any:
        nonlocal broken
        if broken or not _Compiler.enabled:
            return kernel(*args)
        try:
            return fast(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            broken = True
            if _Compiler.failure is None:
                _Compiler.failure = str(error).splitlines()[0]
                log.warning("not every kernel is compiled, some run eagerly: %s", _Compiler.failure)
            return kernel(*args)

    return call
