"""Which library multiplies float32 on a CPU: oneDNN on AMD's, as MKL has its fast kernels for Intel's."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


@contextmanager
def products(model: nn.Module) -> Iterator[None]:
    """Let oneDNN multiply in the linear layers of `model` while the context is open, where MKL is slower.

    Products are those of MKL to float tolerance, with the same bits for any number of threads. What needs
    gradients, is no plain float32 on a CPU or has a forward pass other than its class's is left to torch.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in m.__dict__]
    layers = layers if _mkl_is_slow() else []
    try:
        for layer in layers:
            layer.__dict__["forward"] = MethodType(_forward, layer)
        yield
    finally:
        for layer in layers:  # of which another thread, or a hook, may have taken it
            if getattr(layer.__dict__.get("forward"), "__func__", None) is _forward:
                layer.__dict__.pop("forward", None)


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    plain = type(input) is Tensor and type(weight) is nn.Parameter  # no spikes, nothing quantised
    float32 = plain and input.dtype == weight.dtype == torch.float32
    other = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not weight.shape[1]
    if not float32 or other or not (input.is_cpu and weight.is_cpu):
        return linear(input, weight, bias)
    whole = None if bias is None else bias.contiguous()  # or oneDNN reads what lies between
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, whole, "none", [], "")
    return product


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether torch multiplies float32 with MKL on an AMD processor: 100 of oneDNN's 220 GFLOP/s on two
    cores of an EPYC with AVX-512."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    cpus = Path("/proc/cpuinfo")
    name = cpus.read_text() if cpus.exists() else platform.processor()
    return "AuthenticAMD" in name
