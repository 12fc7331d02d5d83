"""What a linear layer costs on Loihi, from four counts: deliveries, messages, accesses and updates.

A spike of step t reaches the output neurons at step t + 1, so that T planes take T + 1 steps of the chip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stages.profiles.base import UNITS
from stages.profiles.loihi import Loihi


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
