"""Hardware profiles: what the work of a model costs where it runs, part by part.

The work is a frame with a row for every operation of a phase, whose counts are those of `Counts`. A
profile is arithmetic on that frame: it says how often something happens and what it costs each time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

from stages.analysis.operations import PRODUCTS
from stages.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

UNITS = {"fJ": 1e-3, "pJ": 1.0, "nJ": 1e3}
PARTS = ("compute", "weights", "inputs", "potentials", "outputs", "addressing", "messages")
ALLOWED = {
    "choice": f"choose {', '.join(UNITS)}",
    "text": "say in which paper or data sheet the prices stand",
    "count": "give a whole number, 1 or more",
    "yes or no": "give true or false",
    "price": "give a finite number, 0 or more",
}


class Counts(NamedTuple):
    """What one operation does in one phase; all but `macs` and `acs` are zero for what is no product.

    macs, acs: multiplications with their additions, and additions that spikes select. dense: the part
    of the product's values that are multiplied as floats. operand_bits, weight_bits: widths of the
    integers that the rest multiplies, NaN where it does not. inputs: values that enter; spikes: of these
    and, where both operands spike, of the other. entered: values that meet a spike or none, so that acs
    / entered is spikes a value. outputs: accumulators. rows: tokens. steps: until the last spike may
    have come. weights: distinct values of the other operand (weights, or keys of a cache) that the phase
    reads. stored: how many there are in that memory. cached: values that the phase adds to it.
    """

    macs: float
    acs: float
    dense: float = 1.0
    operand_bits: float = math.nan
    weight_bits: float = math.nan
    inputs: float = 0.0
    spikes: float = 0.0
    entered: float = 0.0
    outputs: float = 0.0
    rows: float = 1.0
    steps: float = 0.0
    weights: float = 0.0
    stored: float = 0.0
    cached: float = 0.0


class Item(NamedTuple):
    """A part of the energy of every row of work: how often an event happens [rows], and its price in
    the profile's unit, one for all or one a row."""

    part: str
    event: str
    happens: pd.Series
    price: pd.Series | float


@dataclass(frozen=True)
class Integers:
    """What a multiplication of integers with its addition costs: `multiply` for every pair of a bit of one
    and a bit of the other, `add` for every bit of an accumulator of `accumulator` bits.

    Multipliers grow with the product of their widths, adders with their width: Horowitz (ISSCC 2014) has
    0.2 and 3.1 pJ for 8 and 32 bits, 0.03 and 0.1 pJ.
    """

    multiply: float
    add: float
    accumulator: int

    def __post_init__(self) -> None:
        check(self, "integers", accumulator="count")

    def mac(self, operand: pd.Series, weight: pd.Series) -> pd.Series:
        """The cost of one, of operands and weights of so many bits."""
        return self.multiply * operand * weight + self.add * self.accumulator


@dataclass(frozen=True, kw_only=True)
class Profile(ABC):
    """A hardware profile: `name` in tables and results, `unit` of all prices, `source` of the prices.

    `mac`, `ac`: a multiplication with its addition and an addition of the dense model's numbers;
    `integers`: of a model whose operands are integers.
    """

    name: str
    unit: str
    source: str
    mac: float
    ac: float
    integers: Integers

    def __post_init__(self) -> None:
        check(self, f"profile {self.name}", unit="choice", source="text")

    @abstractmethod
    def items(self, work: pd.DataFrame) -> Iterator[Item]:
        """What is spent on the rows of work; a row is in no item where the profile has no model of it."""

    def compute(self, work: pd.DataFrame) -> Iterator[Item]:
        """The arithmetic of all rows."""
        integer = self.integers.mac(work["operand_bits"], work["weight_bits"])
        mixed = work["dense"] * self.mac + (1 - work["dense"]) * integer
        yield Item(
            "compute", "MAC", work["macs"], mixed.where(work["operand_bits"].notna(), self.mac)
        )
        yield Item("compute", "AC", work["acs"], self.ac)

    def spent(self, work: pd.DataFrame) -> pd.DataFrame:
        """The items of all rows: columns part event count pJ J, on the index of the work."""
        import pandas as pd

        scale = UNITS[self.unit]
        frames = []
        for part, event, count, price in self.items(work):
            frame = pd.DataFrame({"count": count, "pJ": price * scale}, index=count.index)
            frame.insert(0, "part", part)
            frame.insert(1, "event", event)
            frames.append(frame[(frame["count"] * frame["pJ"]) != 0])
        spent = pd.concat(frames)
        return spent.assign(J=spent["count"] * spent["pJ"] * 1e-12)

    def joules(self, work: pd.DataFrame) -> float:
        """The sum of what is spent on the work, NaN where some of it is undefined."""
        parts = ((happens * price).sum(skipna=False) for _, _, happens, price in self.items(work))
        return float(sum(parts)) * UNITS[self.unit] * 1e-12


def products(work: pd.DataFrame) -> pd.DataFrame:
    """The rows of linear layers and of attention's products."""
    return work[work["kind"].isin(PRODUCTS)]


def multiplied(work: pd.DataFrame) -> pd.Series:
    """The part of a product's values that is multiplied, as floats or as integers, instead of spiking."""
    return work["dense"].where(work["operand_bits"].isna(), 1.0)


def check(profile: object, where: str, *unchecked: str, **kinds: str) -> None:
    """Raise InputError unless every field of a profile is of its kind, a price where `kinds` says
    nothing."""
    for field in fields(profile):  # type: ignore[arg-type]
        value = getattr(profile, field.name)
        kind = kinds.get(field.name, "price")
        if field.name not in ("name", "integers", *unchecked) and not _fits(value, kind):
            raise InputError(f"energy {where}: {field.name}={value!r}: {ALLOWED[kind]}")


def _fits(value: object, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "choice":
        return value in UNITS
    if kind == "text":
        return isinstance(value, str) and bool(value.strip())
    if kind == "yes or no":
        return isinstance(value, bool)
    if kind == "count":
        return isinstance(value, int) and number and value >= 1
    return number and 0 <= value < math.inf  # type: ignore[operator]
