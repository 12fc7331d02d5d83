"""Spike planes: a coded value as ternary tensors, one a step, and the weight that each step carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.codings.coding import Coding
from stages.codings.neurons import Params, Spikes, SpikeTime
from stages.codings.ranges import RangeSpikes
from stages.errors import InputError

Arrange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Planes:
    """Values as sum_p weight[p] * plane[p], planes [P, *X] int8 in {-1, 0, 1}, weight [P] float32.

    `step` [P] is the timestep of a plane, from 0. `row` [*X without its last dimension, 1] scales the
    rows of the sum, where a softmax is computed as spikes; None elsewhere.
    """

    plane: Tensor
    weight: Tensor
    step: Tensor
    row: Tensor | None = None

    def value(self) -> Tensor:
        """The decoded values [*X] float32, summed in the order of the planes."""
        total = torch.zeros(self.plane.shape[1:], device=self.plane.device)
        for plane, weight in zip(self.plane, self.weight, strict=True):
            total += weight * plane
        return total if self.row is None else total * self.row

    def product(self, other: Tensor, arrange: Arrange = lambda plane: plane) -> Tensor:
        """arrange(values) @ other, step by step: every matrix product has a ternary operand.

        `arrange` lays out [*X] as the product needs it; the phase weight is applied to what a step
        has accumulated.
        """
        total: Tensor | float = 0.0
        for plane, weight in zip(self.plane, self.weight, strict=True):
            total = total + weight * torch.matmul(arrange(plane.to(other.dtype)), other).float()
        if self.row is not None:
            assert isinstance(total, Tensor)
            total = total * arrange(self.row)
        assert isinstance(total, Tensor)
        return total.to(other.dtype)

    def first(self, steps: int) -> Planes:
        """What has arrived after the first `steps` steps."""
        kept = self.step < steps
        return replace(self, plane=self.plane[kept], weight=self.weight[kept], step=self.step[kept])


def check_ternary(coding: Coding) -> None:
    """Raises InputError for a coding whose steps are no spikes in {-1, 0, 1}."""
    if not coding.neuron or getattr(coding, "tokenwise", False):
        raise InputError(
            f"coding={coding.name} has no steps in {{-1, 0, 1}}: a bound has no spikes, and gif emits "
            "whole numbers on a range of each token; use runtime.execution=fast, or another coding"
        )


def planes(coding: Coding, x: Tensor, p: Params) -> tuple[Planes, Tensor]:
    """The planes of x [*X], and the spikes of every value [*X]."""
    spikes = coding.encode(x, p)
    table = coding.table(p)
    if isinstance(spikes, SpikeTime):
        return _times(spikes, table), spikes.count
    return _trains(spikes, table), spikes.count


def _times(spikes: SpikeTime, table: Tensor) -> Planes:
    """One plane a step, and one for the value of silence where that is not zero."""
    sign = spikes.sign.to(torch.int8)
    last = spikes.timesteps + (1 if bool(table[spikes.timesteps] != 0) else 0)
    steps = torch.arange(last, device=table.device)
    shape = (-1, *[1] * sign.dim())
    fired = spikes.time == steps.view(shape)
    return Planes(sign * fired, table[:last], torch.where(steps == spikes.timesteps, 0, steps))


def _trains(spikes: Spikes, table: Tensor) -> Planes:
    """One plane a step and grain, and one a grain for the spike of its floor.

    A code's magnitude is the sum of those of its single spikes, which is where the weights are read.
    """
    steps = len(spikes.train)
    grains = len(table) >> steps
    base = torch.arange(grains, device=table.device) << steps
    floor = table[base]
    single = table[base[:, None] + (1 << torch.arange(steps - 1, -1, -1, device=table.device))]
    weight = single - floor[:, None]  # [grains, steps]
    own = spikes.grain == torch.arange(grains, device=table.device).view(
        -1, *[1] * spikes.grain.dim()
    )
    signed = own.to(torch.int8) * spikes.sign  # [grains, *X]
    plane = (signed[:, None] * spikes.train.to(torch.int8)).flatten(0, 1)
    step = torch.arange(steps, device=table.device).repeat(grains)
    found = Planes(plane, weight.flatten(), step)
    if not isinstance(spikes, RangeSpikes) or not bool((floor != 0).any()):
        return found
    return Planes(
        torch.cat([signed * spikes.floor, found.plane]),
        torch.cat([floor, found.weight]),
        torch.cat([torch.zeros_like(base), found.step]),
    )
