"""What a linear layer costs on Loihi, from four counts: deliveries, messages, accesses and updates.

A spike of step t reaches the output neurons at step t + 1, so that T planes take T + 1 steps of the chip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from stages.errors import InputError


@dataclass(frozen=True)
class LoihiCosts:
    """Picojoules of one event, and how many neurons a core holds.

    Source: Davies et al. 2018, https://doi.org/10.1109/MM.2018.112130359, as the architecture description
    of SANA-FE 2.2.9 has it (Boyle et al. 2025, https://doi.org/10.1109/TCAD.2025.3537971), with synapses
    stored as a dense matrix. Raises InputError for a number below 0.
    """

    delivery_pj: float = 35.5  # a weight read and added because a spike has reached it
    message_pj: float = 111.0  # a spike sent to one core
    access_pj: float = 51.2  # a neuron looked at, at every step
    update_pj: float = 21.6  # a potential that was not zero, or got an input, written back
    neurons_per_core: int = 1024

    def __post_init__(self) -> None:
        for each in fields(self):
            if not 0 <= getattr(self, each.name) < math.inf:
                raise InputError(f"{each.name}={getattr(self, each.name)!r}: give 0 or more")
        if self.neurons_per_core < 1:
            raise InputError(f"neurons_per_core={self.neurons_per_core}: give 1 or more")


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
    neurons_per_core: int = LoihiCosts.neurons_per_core,
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


def loihi_energy(counts: LoihiCounts, costs: LoihiCosts) -> dict[str, float]:
    """Return the joules of every count, by its name in the plural."""
    return {
        "deliveries": counts.deliveries * costs.delivery_pj * 1e-12,
        "messages": counts.messages * costs.message_pj * 1e-12,
        "accesses": counts.accesses * costs.access_pj * 1e-12,
        "updates": counts.updates * costs.update_pj * 1e-12,
    }
