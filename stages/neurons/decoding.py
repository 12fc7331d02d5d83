"""What it costs to turn the spikes of a site's values into what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """What decoding costs at every site, each float64 [*S].

    macs, acs: multiplications and additions of every accumulator that a product with the site has,
    beside what its spikes select; comparisons: of every value, to choose its neuron; steps: timesteps
    until the last spike of a value may have come.
    """

    macs: Tensor
    acs: Tensor
    comparisons: Tensor
    steps: Tensor
