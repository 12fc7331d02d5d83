"""Spike planes: a coded value as ternary tensors, one a step, and the weight that each step carries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.codings.base import Coding
from stages.errors import InputError
from stages.neurons.channels import centre, unit
from stages.neurons.ranges import Bank, DigitSpikes, RangeSpikes
from stages.neurons.slots import FreeWindow, SlotSpikes
from stages.neurons.spikes import Counts, Params, SpikeTime
from stages.ports.trains import Trains


@dataclass(frozen=True)
class Group:
    """Consecutive slots whose spikes are summed as they come, and that sum added to the total again and
    again, so that an early spike counts more.

    gaps: at each slot, by how many bits the sum is shifted when it is added; slots behind them add
    nothing. A group of one slot adds its spikes to the total itself. shift: by how many bits the total
    moves before the group; floor: what each of its spikes is worth beside.
    """

    slots: int
    gaps: tuple[int, ...]
    shift: int = 0
    floor: float = 0.0

    def weights(self, unit: float) -> list[float]:
        """What a spike of each slot is worth, where one in the total is worth `unit`."""
        counts = [sum(2**gap for gap in self.gaps[slot:]) for slot in range(self.slots)]
        return [unit * count + self.floor for count in counts]


@dataclass(frozen=True)
class Accumulator:
    """The planes that one accumulator sums, in the order of their steps.

    plane: int8 tensors in {-1, 0, 1} of the shape of the values; weight: what a spike of each is
    worth; step: the timestep of each, from 0. With `groups` it adds up running sums, and `unit` is what
    one in the total is worth at the end.
    """

    plane: tuple[Tensor, ...]
    weight: tuple[float, ...]
    step: tuple[int, ...]
    groups: tuple[Group, ...] = ()
    unit: float = 1.0

    @classmethod
    def running(cls, plane: Sequence[Tensor], groups: Sequence[Group], unit: float) -> Accumulator:
        """The accumulator of running sums over planes of a slot each."""
        weight: list[float] = []
        worth = unit
        for group in reversed(groups):
            weight = group.weights(worth) + weight
            worth *= 2**group.shift
        return cls(tuple(plane), tuple(weight), tuple(range(len(plane))), tuple(groups), unit)

    @property
    def shift(self) -> int | None:
        """By how many bits the sum moves from step to step; None where every step is multiplied."""
        pairs = list(zip(self.weight, self.weight[1:], strict=False))
        return next((s for s in (0, 1) if all(a == b * 2**s for a, b in pairs)), None)

    @property
    def spikes(self) -> Iterator[tuple[Tensor, float, int]]:
        """Plane, weight and timestep of every step."""
        return zip(self.plane, self.weight, self.step, strict=True)


# What spikes select, plus `factor` times a sum where there is one, in whose place it may be.
Product = Callable[[Tensor | None, float], Tensor]


def summed(product: Tensor, total: Tensor | None, factor: float) -> Tensor:
    """What a `Product` gives of a product that is there."""
    return product if total is None else torch.add(product, total, alpha=factor)


class Sum:
    """What an accumulator adds up, with as few multiplications as its weights allow: one at the end
    where they halve from step to step or are the same, else one a step."""

    def __init__(self, accumulator: Accumulator) -> None:
        self._shift, self._last = accumulator.shift, accumulator.weight[-1]
        self._total: Tensor | None = None

    @classmethod
    def of(cls, accumulator: Accumulator) -> Sum | RunningSum:
        """The sum that an accumulator makes."""
        return RunningSum(accumulator) if accumulator.groups else cls(accumulator)

    def add(self, product: Product, weight: float) -> None:
        """Add what the spikes of the next plane, of that weight, have selected."""
        if self._shift is not None:
            self._total = product(self._total, 2 if self._shift else 1)
        else:
            term = product(None, 0) * weight
            self._total = term if self._total is None else self._total + term

    def value(self) -> Tensor:
        assert self._total is not None
        return self._total if self._shift is None else self._total * self._last


class RunningSum:
    """What an accumulator with groups adds up: by additions and shifts, which double, with one
    multiplication at the end and one for a floor."""

    def __init__(self, accumulator: Accumulator) -> None:
        groups = accumulator.groups
        self._slots = iter([(group, slot) for group in groups for slot in range(group.slots)])
        self._unit = accumulator.unit
        self._total: Tensor | None = None
        self._floor: tuple[Tensor, float] | None = None

    def add(self, select: Product, weight: float) -> None:
        """Add what the spikes of the next slot have selected."""
        product = select(None, 0)
        group, slot = next(self._slots)
        first = self._total is None
        if self._total is None:
            self._total = torch.zeros_like(product)
        if slot == 0:
            self._total = _shifted(self._total, group.shift)
            self._arrived = torch.zeros_like(product)
        self._arrived = product if group.slots == 1 else self._arrived + product
        if slot < len(group.gaps):
            term = _shifted(self._arrived, group.gaps[slot])
            alone = first and group.slots == 1  # there is nothing yet to add it to
            self._total = term if alone else self._total + term
        if group.floor:
            self._floor = self._arrived, group.floor

    def value(self) -> Tensor:
        assert self._total is not None
        value = self._total * self._unit
        return value if self._floor is None else value + self._floor[0] * self._floor[1]


def _shifted(total: Tensor, bits: int) -> Tensor:
    for _ in range(bits):
        total = total + total
    return total


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
        """Return what has arrived after the first `steps` steps, every spike at its full worth."""
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
            for _, spikes, weight in self.at(step):
                total.add_(spikes, alpha=weight)
        total = total if self.row is None else total * self.row
        return total if self.centre is None else total + self.centre

    def none(self) -> Tensor:
        """Return the decoded values before the first step: zeros [*X] float32."""
        plane = self.accumulators[0].plane[0]
        return torch.zeros(plane.shape, device=plane.device)

    def at(self, step: int) -> Iterator[tuple[int, Tensor, float]]:
        """The spikes of one step: number of their accumulator, what they select [*X] float32, and what
        each is worth, without the scale of the rows."""
        for number, each in enumerate(self.accumulators):
            for plane, weight, when in each.spikes:
                if when == step:
                    yield number, self.selecting(plane, torch.float32), weight


def check_ternary(coding: Coding) -> None:
    """Raise InputError for a coding whose steps are no spikes in {-1, 0, 1}."""
    if not coding.neuron or coding.tokenwise:
        raise InputError(
            f"coding={coding.name} has no steps in {{-1, 0, 1}}: bounds and integers have no spikes, and "
            "gif emits whole numbers on a range of each token; use runtime.execution=fast, or choose "
            "another coding"
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
    trains = Trains.of(coding, x, p)
    if trains is not None:
        ranges = issubclass(trains.kind, RangeSpikes)
        made = (
            _ranges(trains, Bank.of(p, coding.timesteps)) if ranges else _trains(trains, coding, p)
        )
        return made, trains.count
    spikes = coding.encode(x, p)
    if isinstance(spikes, SlotSpikes):
        return _windows(spikes), spikes.count
    if isinstance(spikes, SpikeTime):
        return timed(spikes, coding.table(p)), spikes.count
    assert isinstance(spikes, DigitSpikes)
    return _digits(spikes, Bank.of(p, coding.timesteps)), spikes.count


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


def _ranges(trains: Trains, bank: Bank) -> Planes:
    """One accumulator a neuron, and one for the spike of every floor above zero."""
    widths, floors, steps = (t.tolist() for t in (bank.width, bank.floor, bank.steps))
    accumulators = []
    for planes, width, floor, count in zip(trains.planes, widths, floors, steps, strict=True):
        *train, ends = planes
        weights = [width * 2.0**-t for t in range(1, len(train) + 1) if 2**t <= count]
        if weights:
            accumulators.append(_accumulator(train, weights))
        if floor > 0:
            accumulators.append(_accumulator([ends], [floor]))
    return Planes(tuple(accumulators))


def _windows(spikes: SlotSpikes) -> Planes:
    """One accumulator a neuron, whose window is one group of running sums, or of free levels."""
    sign = spikes.sign.to(torch.int8)
    accumulators, first = [], spikes.timesteps
    for window in spikes.windows:
        first -= window.slots
        plane = tuple(sign * (spikes.time == first + slot) for slot in range(window.slots))
        if isinstance(window, FreeWindow):
            step = tuple(range(window.slots))
            accumulators.append(Accumulator(plane, window.levels, step))
        else:
            group = Group(window.slots, window.gaps, floor=window.floor * spikes.unit)
            accumulators.append(Accumulator.running(plane, [group], spikes.unit))
    return Planes(tuple(accumulators))


def _digits(spikes: DigitSpikes, bank: Bank) -> Planes:
    """One accumulator a neuron, a group of running sums a digit."""
    given = zip(
        spikes.neurons, *(t.tolist() for t in (bank.width, bank.floor, bank.steps)), strict=True
    )
    accumulators = []
    for grain, (digits, width, floor, steps) in enumerate(given):
        sign = spikes.sign.to(torch.int8) * (spikes.grain == grain)
        groups = [
            Group(len(d.values), (0,) * (len(d.values) - d.merged), d.bits, floor * d.merged)
            for d in digits
        ]
        slots = sum(group.slots for group in groups)
        plane = [sign * train for train in spikes.train[:slots]]
        accumulators.append(Accumulator.running(plane, groups, width / steps))
    return Planes(tuple(accumulators))


def _trains(trains: Trains, coding: Coding, p: Params) -> Planes:
    """One accumulator a neuron; what a spike is worth is read where the table codes it alone."""
    table, steps = coding.table(p), len(trains.planes[0])
    if issubclass(trains.kind, Counts):
        return Planes((_accumulator(trains.planes[0], [float(table[1])] * steps),))
    places = [1 << shift for shift in range(steps - 1, -1, -1)]
    accumulators = []
    for neuron, planes in enumerate(trains.planes):
        weight = table[[(neuron << steps) + place for place in places]]
        accumulators.append(_accumulator(planes, weight.tolist()))
    return Planes(tuple(accumulators))


def _accumulator(planes: Sequence[Tensor], weights: Sequence[float]) -> Accumulator:
    """That of the first planes of one neuron, a weight each."""
    steps = tuple(range(len(weights)))
    return Accumulator(tuple(planes[: len(weights)]), tuple(weights), steps)
