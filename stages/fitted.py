"""What a fit gives: the coding and the neurons that a model is converted with."""

from __future__ import annotations

from dataclasses import dataclass

from stages.codings.base import Coding
from stages.fitting import FittedNeurons


@dataclass(frozen=True)
class Conversion:
    """A coding with the neurons fitted for it; None in its place means the dense model."""

    coding: Coding
    neurons: FittedNeurons
