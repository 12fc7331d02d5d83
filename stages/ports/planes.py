"""Spike planes: a coded value as ternary tensors, one a step, and the weight that each step carries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.codings.base import Coding
from stages.errors import InputError
from stages.neurons.channels import centre, unit
from stages.neurons.ranges import Bank, RangeSpikes
from stages.neurons.spikes import Counts, Params, Spikes, SpikeTime


@dataclass(frozen=True)
class Accumulator:
    """The planes that one accumulator sums, in the order of their steps.

    plane: int8 tensors in {-1, 0, 1} of the shape of the values; weight: what a spike of each is
    worth; step: the timestep of each, from 0.
    """

    plane: tuple[Tensor, ...]
    weight: tuple[float, ...]
    step: tuple[int, ...]

    @property
    def shift(self) -> int | None:
        """By how many bits the sum moves from step to step; None where every step is multiplied."""
        pairs = list(zip(self.weight, self.weight[1:], strict=False))
        return next((s for s in (0, 1) if all(a == b * 2**s for a, b in pairs)), None)

    @property
    def spikes(self) -> Iterator[tuple[Tensor, float, int]]:
        """Plane, weight and timestep of every step."""
        return zip(self.plane, self.weight, self.step, strict=True)


class Sum:
    """What an accumulator adds up, with as few multiplications as its weights allow: one at the end
    where they halve from step to step or are the same, else one a step."""

    def __init__(self, accumulator: Accumulator) -> None:
        self._shift, self._last = accumulator.shift, accumulator.weight[-1]
        self._total: Tensor | None = None

    def add(self, product: Tensor, weight: float) -> None:
        """Add what the spikes of the next plane, of that weight, have selected."""
        term = product * weight if self._shift is None else product
        if self._total is None:
            self._total = term
        else:
            self._total = (self._total + self._total if self._shift else self._total) + term

    def value(self) -> Tensor:
        assert self._total is not None
        return self._total if self._shift is None else self._total * self._last


@dataclass(frozen=True)
class Planes:
    """Values [*X] as the sums of `accumulators`, each row times `row` [*X] (constant along the last
    dimension) where a softmax is computed as spikes, each value times `unit` [*X] where channels have
    scales, and more by `centre` [C], the last dimension, where features have means."""

    accumulators: tuple[Accumulator, ...]
    row: Tensor | None = None
    unit: Tensor | None = None
    centre: Tensor | None = None

    @property
    def steps(self) -> int:
        """Timesteps until the last plane has arrived."""
        return 1 + max(step for each in self.accumulators for step in each.step)

    def map(self, change: Callable[[Tensor], Tensor]) -> Planes:
        """Lay the planes out as `change` lays out the values."""
        return Planes(
            tuple(
                replace(each, plane=tuple(change(plane) for plane in each.plane))
                for each in self.accumulators
            ),
            None if self.row is None else change(self.row),
            None if self.unit is None else change(self.unit),
            self.centre,
        )

    def selecting(self, plane: Tensor, dtype: torch.dtype) -> Tensor:
        """The spikes of a step as they select what is added up: in {-1, 0, 1}, times the unit."""
        return plane.to(dtype) if self.unit is None else (plane * self.unit).to(dtype)

    def first(self, steps: int) -> Planes:
        """Return what has arrived after the first `steps` steps."""
        kept = []
        for each in self.accumulators:
            number = sum(step < steps for step in each.step)
            if number:
                fields = (each.plane[:number], each.weight[:number], each.step[:number])
                kept.append(Accumulator(*fields))
        return replace(self, accumulators=tuple(kept))

    def value(self) -> Tensor:
        """Return the decoded values [*X] float32."""
        total = self.none()
        for step in range(self.steps):
            self.arrive(total, step)
        total = total if self.row is None else total * self.row
        return total if self.centre is None else total + self.centre

    def none(self) -> Tensor:
        """Return the decoded values before the first step: zeros [*X] float32."""
        plane = self.accumulators[0].plane[0]
        return torch.zeros(plane.shape, device=plane.device)

    def arrive(self, total: Tensor, step: int) -> None:
        """Add what the spikes of one step are worth, without the scale of the rows."""
        for each in self.accumulators:
            for plane, weight, at in each.spikes:
                if at == step:
                    total.add_(self.selecting(plane, total.dtype), alpha=weight)


def check_ternary(coding: Coding) -> None:
    """Raise InputError for a coding whose steps are no spikes in {-1, 0, 1}."""
    if not coding.neuron or coding.tokenwise:
        raise InputError(
            f"coding={coding.name} has no steps in {{-1, 0, 1}}: a bound has no spikes, and gif emits "
            "whole numbers on a range of each token; use runtime.execution=fast, or another coding"
        )


def planes(coding: Coding, x: Tensor, p: Params) -> tuple[Planes, Tensor]:
    """Code x [*X] as planes; also the spikes of every value [*X]. Heads [B, H, S, D] are coded without
    their means, see `stages.neurons.channels.left_out`."""
    scale, mean = unit(x, p), centre(x, p)
    u = x if mean is None else x.float() - mean
    value, count = _planes(coding, u if scale is None else u.float() / scale, p)
    if scale is not None:
        value = replace(value, unit=scale.expand(x.shape))
    return value if mean is None or mean.dim() > 1 else replace(value, centre=mean), count


def _planes(coding: Coding, x: Tensor, p: Params) -> tuple[Planes, Tensor]:
    spikes = coding.encode(x, p)
    if isinstance(spikes, SpikeTime):
        return timed(spikes, coding.table(p)), spikes.count
    if isinstance(spikes, RangeSpikes):
        return _ranges(spikes, Bank.of(p, coding.timesteps)), spikes.count
    return _trains(spikes, coding.table(p)), spikes.count


def timed(spikes: SpikeTime, weight: Tensor, row: Tensor | None = None) -> Planes:
    """Return one plane a step; silence, where it has a weight, is a spike of the last step.

    weight [T] or [T + 1], the last one that of silence; row [*X without its last dimension, 1].
    """
    silent = len(weight) > spikes.timesteps and bool(weight[-1] != 0)
    number = spikes.timesteps + silent
    sign = spikes.sign.to(torch.int8)
    plane = tuple(sign * (spikes.time == t) for t in range(number))
    step = tuple(min(t, spikes.timesteps - 1) for t in range(number))
    accumulator = Accumulator(plane, tuple(weight[:number].tolist()), step)
    return Planes((accumulator,), None if row is None else row.expand(sign.shape).contiguous())


def _ranges(spikes: RangeSpikes, bank: Bank) -> Planes:
    """One accumulator a neuron, and one for the spike of every floor above zero."""
    widths, floors, steps = (t.tolist() for t in (bank.width, bank.floor, bank.steps))
    accumulators = []
    for grain, (width, floor, count) in enumerate(zip(widths, floors, steps, strict=True)):
        sign = spikes.sign.to(torch.int8) * (spikes.grain == grain)
        weights = [width * 2.0**-t for t in range(1, len(spikes.train) + 1) if 2**t <= count]
        if weights:
            accumulators.append(_accumulator(sign, spikes.train[: len(weights)], weights))
        if floor > 0:
            accumulators.append(_accumulator(sign, spikes.floor[None], [floor]))
    return Planes(tuple(accumulators))


def _trains(spikes: Spikes, table: Tensor) -> Planes:
    """One accumulator a neuron; what a spike is worth is read where the table codes it alone."""
    steps = len(spikes.train)
    if isinstance(spikes, Counts):
        sign = spikes.sign.to(torch.int8)
        return Planes((_accumulator(sign, spikes.train, [float(table[1])] * steps),))
    grains = len(table) >> steps
    places = [1 << shift for shift in range(steps - 1, -1, -1)]
    accumulators = []
    for grain in range(grains):
        sign = spikes.sign.to(torch.int8) * (spikes.grain == grain)
        weight = table[[(grain << steps) + place for place in places]]
        accumulators.append(_accumulator(sign, spikes.train, weight.tolist()))
    return Planes(tuple(accumulators))


def _accumulator(sign: Tensor, train: Tensor, weight: Sequence[float]) -> Accumulator:
    """train [T, *X], of which the neuron takes the spikes where its `sign` [*X] is set."""
    plane = tuple(sign * spikes.to(torch.int8) for spikes in train)
    return Accumulator(plane, tuple(weight), tuple(range(len(plane))))
