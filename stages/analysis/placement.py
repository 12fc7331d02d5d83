"""Which core of a chip holds which neuron of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.errors import InputError


@dataclass(frozen=True)
class Room:
    """What one core offers: the names of its units that emit a given train, of which a neuron takes one,
    and of the first unit of every other kind ("" for none); the `most` neurons that it holds."""

    emitters: tuple[str, ...]
    soma: str
    dendrite: str
    synapse: str
    most: int
    message_pj: float = 0.0  # of a message out of this core
    reception_pj: float = 0.0  # of a message into it


@dataclass(frozen=True)
class Placement:
    """The core and the place in it of every neuron: inputs [signs * inputs], outputs [outputs]."""

    inputs: tuple[tuple[int, int], ...]
    outputs: tuple[tuple[int, int], ...]

    @property
    def destinations(self) -> tuple[int, ...]:
        """The cores that hold outputs, each of which gets a message of every spike."""
        return tuple(sorted({core for core, _ in self.outputs}))


def place(inputs: int, outputs: int, rooms: Sequence[Room]) -> Placement:
    """Fill the cores in their order: the inputs first, the outputs from the next core on.

    Raises InputError where the chip has no room for them.
    """
    first = _filled(inputs, [min(len(r.emitters), r.most) for r in rooms], 0)
    free = 0 if first is None else first[-1][0] + 1
    capacity = [r.most if r.soma and r.dendrite and r.synapse else 0 for r in rooms]
    second = None if first is None else _filled(outputs, capacity, free)
    if first is None or second is None:
        emitting = sum(min(len(r.emitters), r.most) for r in rooms)
        raise InputError(
            f"a layer of {inputs} inputs (one a sign) and {outputs} outputs does not fit on the chip: its "
            f"{len(rooms)} cores have room for {emitting} neurons of model input and, behind those that "
            f"hold inputs, {sum(capacity[free:])} of model leaky_integrate_fire; choose a smaller layer"
        )
    return Placement(first, second)


def _filled(number: int, capacity: Sequence[int], start: int) -> tuple[tuple[int, int], ...] | None:
    """Core and place of `number` neurons from core `start` on; None where there are too few."""
    places = ((core, i) for core in range(start, len(capacity)) for i in range(capacity[core]))
    filled = tuple(each for each, _ in zip(places, range(number), strict=False))
    return filled if len(filled) == number else None
