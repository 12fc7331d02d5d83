"""Weights and the cache of keys and values stream from DRAM, activations lie in SRAM.

The model of an accelerator whose chip holds no weights: they are read once a pass and used for all tokens
of it and in all timesteps. What a spike spares there is arithmetic, not traffic; accumulators are
touched once in every step that selects something for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.profiles.base import Item, Profile, check, multiplied, products

if TYPE_CHECKING:
    import pandas as pd

KINDS = {"unit": "choice", "source": "text"}
KINDS |= dict.fromkeys(("reuse_steps", "hold_potentials"), "yes or no")
KINDS |= dict.fromkeys(("weight_bits", "value_bits", "cache_bits", "accumulator_bits"), "count")
KINDS |= dict.fromkeys(("event_bits", "reuse_tokens", "batch"), "count")


@dataclass(frozen=True, kw_only=True)
class Streamed(Profile):
    """`dram`, `sram`: the price of a bit. `weight_bits`, `cache_bits`, `value_bits`, `accumulator_bits`:
    of a weight, of a key's or value's number in the cache, of an activation, of an accumulator, for
    integers as many as they have. `event_bits`: of a spike as a message. `reuse_tokens`: tokens that
    share one reading of a weight or a key. `reuse_steps`: whether all timesteps share it.
    `hold_potentials`: whether an accumulator stays in a register through all steps, instead of being read
    and written in each that selects something for it. `batch`: sequences that share a reading of
    weights."""

    dram: float
    sram: float
    weight_bits: int
    cache_bits: int
    value_bits: int
    accumulator_bits: int
    event_bits: int
    reuse_tokens: int
    reuse_steps: bool
    hold_potentials: bool
    batch: int

    def __post_init__(self) -> None:
        check(self, f"profile {self.name}", **KINDS)

    def items(self, work: pd.DataFrame) -> Iterator[Item]:
        yield from self.compute(work)
        product = products(work)
        dense, linear = multiplied(product), product["kind"] == "linear"
        integer = product["operand_bits"].notna()
        # of attention's products both operands are activations
        fallback = _either(linear, self.weight_bits, self.cache_bits)
        width = product["weight_bits"].where(integer, fallback)
        readings = np.ceil(product["rows"] / self.reuse_tokens)
        if not self.reuse_steps:
            readings = readings * (dense + (1 - dense) * product["steps"].clip(lower=1))
        shared = _either(linear, 1 / self.batch, 1.0)
        yield Item("weights", "read", product["weights"] * readings * shared, width * self.dram)
        yield Item("weights", "write", product["cached"], width * self.dram)
        values = product["operand_bits"].where(integer, float(self.value_bits))
        yield Item("inputs", "read", product["inputs"] * dense, values * self.sram)
        yield Item("inputs", "spike read", product["spikes"], self.event_bits * self.sram)
        accumulator = self.accumulator_bits * self.sram
        steps = 1 if self.hold_potentials else product["steps"]
        every = product["outputs"] * (1 - dense) * steps
        touched = product["acs"].where(product["acs"] < every, every)
        for event in ("read", "write"):
            yield Item("potentials", event, touched, accumulator)
        yield Item("outputs", "write", product["outputs"], accumulator)


def _either(condition: pd.Series, yes: float, no: float) -> pd.Series:
    """One of two numbers a row."""
    return condition.map({True: float(yes), False: float(no)})
