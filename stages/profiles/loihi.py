"""Loihi, whose weights lie on the chip: synapses, messages, and the neurons of every timestep.

Four counts with the prices of SANA-FE's description of the chip (sanafe 2.2.9, after Davies et al., IEEE
Micro 2018). A token takes a timestep more than its spikes, as these arrive a step later. Left out are
hops between tiles, a few thousandths, and what the chip has no circuit for: element-wise operations, and
the decoding of codes that no leak does. Keys and values are priced as if they were weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.profiles.base import Item, Profile, check, multiplied, products

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
