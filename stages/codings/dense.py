"""No coding: the row of the ANN, through the same code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Coding
from stages.errors import InputError
from stages.neurons.spikes import Params
from stages.registry import register


@register("coding/dense", was="stages.codings.dense.Dense")
@dataclass(frozen=True)
class Dense(Coding):
    """The model as it is; nothing is captured, fitted or patched."""

    name: str = "dense"

    timesteps = 0
    converts = False
    neuron = False
    convention = "none"

    def fit(self, atoms: Atoms) -> NoReturn:
        self._refuse("fit")

    def encode(self, x: Tensor, p: Params) -> NoReturn:
        self._refuse("encode")

    def table(self, p: Params) -> NoReturn:
        self._refuse("list the levels of")

    def quantise(self, x: Tensor, p: Params) -> NoReturn:
        self._refuse("quantise")

    def _refuse(self, verb: str) -> NoReturn:
        raise InputError(
            f"coding={self.name} is the model as it is, with nothing to {verb}: choose another coding"
        )
