"""What every coding provides, and the checks they share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from stages.errors import InputError
from stages.neurons.neurons import Params, Spikes, SpikeTime

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.distribution import Atoms
    from stages.fitting import Algorithm1
    from stages.model.sites import Site

MAX_TIMESTEPS = 16
SITES_AT_ONCE = 64  # of some 300 kB each while the errors of their atoms are added up


@dataclass(frozen=True)
class Fit:
    """Fitted parameters, site dimension first, and the loss of every iteration [sites, iterations]
    (None for a coding that is not trained by gradient)."""

    params: dict[str, Tensor]
    curve: Tensor | None = None


@runtime_checkable
class Coding(Hashable, Protocol):
    """A coding: how a site's neuron is fitted, and what it does to a value."""

    @property
    def name(self) -> str: ...

    @property
    def timesteps(self) -> int: ...

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
    def convention(self) -> str:
        """How spikes are counted: unary, bit_plane, one_spike, or none."""

    @property
    def decode_macs(self) -> int:
        """Multiplications per accumulator that turn step sums into a value."""

    @property
    def gate_comparisons(self) -> int:
        """Comparisons per value that choose the neuron."""

    def fit(self, atoms: Atoms, algorithm: Algorithm1 | None) -> Fit:
        """Fits all sites of `atoms` as one batched problem."""

    def encode(self, x: Tensor, p: Params) -> Spikes | SpikeTime:
        """The time-stepped neuron of one site on x."""

    def table(self, p: Params) -> Tensor:
        """Magnitude of every code in float32, [*S, codes]."""

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Value (float32) and spikes of every x in one pass."""


# --- what a coding may declare beyond that ---------------------------------------------------------


class Statistic(Hashable, Protocol):
    """A measurement of the dense model on calibration text that some coding needs beyond the
    distribution; a frozen dataclass whose fields determine it, and an artifact of its own."""

    @property
    def name(self) -> str: ...

    def run(
        self, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
    ) -> dict[str, Tensor]:
        """Tensors with the dimension of `sites` first, over windows ids [W, S]."""


@runtime_checkable
class Observing(Protocol):
    """A coding that finds the tensors of its statistics in `Atoms.statistics[name]` when it fits."""

    @property
    def statistics(self) -> tuple[Statistic, ...]: ...


@runtime_checkable
class Partial(Protocol):
    """A coding that leaves the sites of some roles dense, as its authors do."""

    @property
    def dense_roles(self) -> tuple[str, ...]: ...


@runtime_checkable
class Tokenwise(Protocol):
    """A coding whose scale depends on the whole token: `quantise` sees x [..., C] as the model has
    it, [B, S, C] or [B, H, S, D], and has no error or spikes on single values."""

    @property
    def tokenwise(self) -> bool: ...


@runtime_checkable
class ReplacesSoftmax(Protocol):
    """A coding that computes the attention probabilities in its own way."""

    def softmax(
        self, scores: Tensor, scaling: float, mask: Tensor, p: Params
    ) -> tuple[Tensor, Tensor]:
        """Probabilities (float32) and spikes of scores [B, H, Q, K], zero where mask forbids."""


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


def error_and_spikes(coding: Coding, atoms: Atoms, params: Params) -> tuple[Tensor, Tensor]:
    """Expected squared error and spikes of one value of every site over its atoms, [S] float64;
    NaN where they depend on the whole token."""
    sites = torch.arange(len(atoms.maximum))
    if isinstance(coding, Tokenwise):
        unknown = torch.full(sites.shape, torch.nan, dtype=torch.float64)
        return unknown, unknown
    parts = []
    for index in sites.split(SITES_AT_ONCE):
        x, weight = atoms.rows(index).signed_points()
        own = {name: value[index].float() for name, value in params.items()}
        value, count = coding.quantise(x.float(), own)
        error = ((value.double() - x) ** 2 * weight).sum(-1)
        parts.append((error, (count.double() * weight).sum(-1)))
    errors, spikes = zip(*parts, strict=True)
    return torch.cat(errors), torch.cat(spikes)


def squared_error(coding: Coding, atoms: Atoms, params: Params) -> Tensor:
    """Expected squared error of every site over its atoms, [S] float64."""
    return error_and_spikes(coding, atoms, params)[0]
