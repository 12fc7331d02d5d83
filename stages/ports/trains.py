"""The planes of spike trains from one kernel, which reads a value once for all steps and neurons."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.codings.base import Coding
from stages.compiler import fused
from stages.neurons.ranges import RangeSpikes
from stages.neurons.spikes import Counts, Params, Spikes
from stages.ports.kernels import EAGER_BELOW

ELEMENTWISE = (RangeSpikes, Spikes, Counts)
_Kernel = Callable[[Tensor, Params], tuple[list[Tensor], Tensor]]


@dataclass(frozen=True)
class Trains:
    """`planes` of every neuron, its T steps and then, of ranges, its floor: int8 [*X] in {-1, 0, 1};
    `count` [*X]: spikes of a value; `kind`: of the trains that they are made of."""

    planes: list[list[Tensor]]
    count: Tensor
    kind: type

    @classmethod
    def of(cls, coding: Coding, x: Tensor, p: Params) -> Trains | None:
        """The trains of contiguous x [*X]; None for a coding whose spikes are no such trains."""
        flat = x.reshape(-1)
        sample = coding.encode(flat[:1], p)
        if type(sample) not in ELEMENTWISE or coding.tokenwise:
            return None
        neurons = _neurons(coding, sample, p)
        eager, fast = _kernel(coding, neurons)
        every, count = (fast if x.numel() >= EAGER_BELOW else eager)(flat, p)
        steps = len(every) // neurons
        shaped = [plane.view(x.shape) for plane in every]
        rows = [shaped[start : start + steps] for start in range(0, len(every), steps)]
        return cls(rows, count.view(x.shape), type(sample))


def _neurons(coding: Coding, sample: Spikes | object, p: Params) -> int:
    if isinstance(sample, RangeSpikes):
        return p["scale"].shape[-1]
    assert isinstance(sample, Spikes)
    return 1 if isinstance(sample, Counts) else len(coding.table(p)) >> len(sample.train)


@functools.lru_cache(maxsize=64)
def _kernel(coding: Coding, neurons: int) -> tuple[_Kernel, _Kernel]:
    """The same expression eager and compiled: the planes of every neuron, and the spikes of a value."""

    def kernel(x: Tensor, p: Params) -> tuple[list[Tensor], Tensor]:
        spikes = coding.encode(x, p)
        assert isinstance(spikes, Spikes)
        train = [each.to(torch.float32) for each in spikes.train.unbind()]
        if isinstance(spikes, RangeSpikes):
            train.append(spikes.floor.to(torch.float32))
        sign = spikes.sign.to(torch.float32)  # bytes on the way cost eight times as much
        own = [torch.where(spikes.grain == neuron, sign, 0.0) for neuron in range(neurons)]
        return [(each * fired).to(torch.int8) for each in own for fired in train], spikes.count

    return kernel, fused(kernel, one_pass=True)
