"""Loihi, whose weights lie on the chip: synapses, messages, and the neurons of every timestep.

Four counts with the prices of SANA-FE's description of the chip (sanafe 2.2.9, after Davies et al., IEEE
Micro 2018). A token takes a timestep more than its spikes, as these arrive a step later. Left out are
hops between tiles, a few thousandths, and what the chip has no circuit for: element-wise operations, and
the decoding of codes that no leak does. Keys and values are priced as if they were weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.profiles.base import UNITS, Item, Profile, check, multiplied, products

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Loihi(Profile):
    """`delivery`: a spike at a synapse; `message`: a spike to a core, of `neurons_per_core`; `access`:
    of a neuron in a step; `update`: of one whose potential changes. A model with a product that is
    multiplied has no energy here: the chip only adds."""

    delivery: float
    message: float
    access: float
    update: float
    neurons_per_core: int

    def __post_init__(self) -> None:
        kinds = {"unit": "choice", "source": "text", "neurons_per_core": "count"}
        check(self, f"profile {self.name}", **kinds)

    def items(self, work: pd.DataFrame) -> Iterator[Item]:
        product = products(work)
        spiking = multiplied(product) == 0
        cores = np.ceil(product["outputs"] / product["rows"] / self.neurons_per_core)
        yield Item("weights", "delivery", product["acs"].where(spiking), self.delivery)
        yield Item("messages", "message", product["spikes"] * cores, self.message)
        yield Item("potentials", "access", product["outputs"] * (product["steps"] + 1), self.access)
        yield Item("potentials", "update", product["outputs"] * product["steps"], self.update)


@dataclass(frozen=True)
class LoihiCounts:
    """How often each of the four events happens."""

    deliveries: int
    messages: int
    accesses: int
    updates: int


def loihi_counts(
    spikes: int,
    outputs: int,
    steps: int,
    rows: int = 1,
    updates: int | None = None,
    neurons_per_core: int = 1024,
) -> LoihiCounts:
    """Count the events of a layer of `outputs` neurons that `spikes` spikes of `rows` tokens reach, each
    token in `steps` = T planes.

    deliveries = spikes * outputs, also where the weight is 0
    messages   = spikes * ceil(outputs / neurons_per_core), one a core that holds outputs
    accesses   = rows * outputs * (T + 1), of idle neurons too
    updates    = rows * outputs * T, the most there can be, unless `updates` are given: none happen before
                 the first spike of a token

    Not counted: hops between tiles (3.0 pJ each east and west, 4.2 pJ north and south) and the neurons
    that emit the spikes (69.3 pJ a spike, were they the layer before on the chip).
    """
    return LoihiCounts(
        deliveries=spikes * outputs,
        messages=spikes * math.ceil(outputs / neurons_per_core),
        accesses=rows * outputs * (steps + 1),
        updates=rows * outputs * steps if updates is None else updates,
    )


def loihi_energy(counts: LoihiCounts, costs: Loihi) -> dict[str, float]:
    """Return the joules of every count, by its name in the plural."""
    joule = UNITS[costs.unit] * 1e-12
    return {
        "deliveries": counts.deliveries * costs.delivery * joule,
        "messages": counts.messages * costs.message * joule,
        "accesses": counts.accesses * costs.access * joule,
        "updates": counts.updates * costs.update * joule,
    }
