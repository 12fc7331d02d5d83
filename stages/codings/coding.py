"""What every coding provides, and the checks they share."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from stages.codings.neurons import Params, Spikes
from stages.errors import InputError

if TYPE_CHECKING:
    from stages.distribution import Atoms
    from stages.fitting import Algorithm1

MAX_TIMESTEPS = 16


@dataclass(frozen=True)
class Fit:
    """Fitted parameters, site dimension first, and the loss of every iteration [sites, iterations]
    (None for a coding that is not trained by gradient)."""

    params: dict[str, Tensor]
    curve: Tensor | None = None


class Coding(Hashable, Protocol):
    """A coding: how a site's neuron is fitted, and what it does to a value."""

    name: str
    timesteps: int

    @property
    def grains(self) -> int:
        """Neurons (gated) or bases in time (multigrain) per activation."""

    @property
    def trained(self) -> bool:
        """Whether `fit` runs Algorithm 1 (and so depends on its settings and on drawn samples)."""

    @property
    def neuron(self) -> bool:
        """Whether the code is a spike train; bounds are quantisers without spikes."""

    @property
    def decode_macs(self) -> int:
        """Multiplications per accumulator that turn step sums into a value."""

    @property
    def gate_comparisons(self) -> int:
        """Comparisons per value that choose the neuron."""

    def fit(self, atoms: Atoms, algorithm: Algorithm1 | None) -> Fit:
        """Fits all sites of `atoms` as one batched problem."""

    def encode(self, x: Tensor, p: Params) -> Spikes:
        """The time-stepped neuron of one site on x."""

    def table(self, p: Params) -> Tensor:
        """Magnitude of every code in float32, [*S, codes]."""

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Value (float32) and spikes of every x in one pass."""


def check_timesteps(name: str, timesteps: int) -> None:
    """Raises InputError unless 1 <= T <= 16."""
    if not isinstance(timesteps, int) or not 1 <= timesteps <= MAX_TIMESTEPS:
        raise InputError(
            f"coding.timesteps={timesteps!r} for {name}: give a whole number from 1 to "
            f"{MAX_TIMESTEPS}"
        )


def half_step(timesteps: int, v0: str, name: str) -> float:
    """The initial potential of a base-2 neuron: 0, or half of its last step, 2^-(T+1)."""
    if v0 not in ("zero", "half_step"):
        raise InputError(f"coding.v0={v0!r} for {name}: choose zero or half_step")
    return 0.0 if v0 == "zero" else 2.0 ** -(timesteps + 1)


def site_params(params: Params, index: int) -> dict[str, Tensor]:
    """The parameters of one site."""
    return {name: value[index] for name, value in params.items()}


def squared_error(coding: Coding, atoms: Atoms, params: Params) -> Tensor:
    """Expected squared error of every site over its atoms, [S] float64."""
    x, weight = atoms.points()
    value, _ = coding.quantise(x.float(), {k: v.float() for k, v in params.items()})
    return ((value.double() - x) ** 2 * weight).sum(-1)


def spikes_per_value(coding: Coding, atoms: Atoms, params: Params) -> Tensor:
    """Expected spikes of one value of every site over its atoms, [S] float64."""
    x, weight = atoms.points()
    _, count = coding.quantise(x.float(), {k: v.float() for k, v in params.items()})
    return (count.to(torch.float64) * weight).sum(-1)
