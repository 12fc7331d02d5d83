"""What linear layers and neurons of a run are given and send, plane by plane, and the counts that other
packages have made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from stages.codings.base import Coding
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.fitted import Conversion
from stages.model.sites import ROLES, find_sites
from stages.neurons.spikes import Params
from stages.ports import attention, stepped
from stages.ports.coded import Coded
from stages.ports.counters import Counters
from stages.ports.patched import patched

SAMPLES, LENGTH = 2, 12
Counts = tuple[float, float, float]  # MACs, ACs, dense products


@dataclass(frozen=True)
class Row:
    """A run of the tiny Llama in float64, whose codes no last bit moves, and what was counted of a sample.

    `neurobench`: Effective_MACs, Effective_ACs and Dense of NeuroBench 2.3.0, its `single_layer_MACs` of
    every plane and every linear layer, as `tests/integration/neurobench_counts.py` makes them again, with
    `sparsity` by its ActivationSparsity and `updates` by its MembraneUpdates, None where a value has
    several neurons. `spikingjelly`: additions of linear layers, of the dense model multiplications, by
    spikingjelly 2.0.0, see `tests/integration/spikingjelly_counts.py`.
    """

    coding: Coding | None
    neurobench: Counts
    spikingjelly: float
    sparsity: float
    updates: float | None
    roles: tuple[str, ...] = ROLES


UNCONVERTED = ("mlp.down", "head.in")
ROWS = {
    "dense": Row(None, (152640, 0, 152640), 152640, 0, 0),
    "las": Row(Las("las", 6, "zero"), (0, 299048, 915840), 299048, 0.6858703987730062, 22570.5),
    "gated": Row(Gated("gated", 5, 2), (0, 337800, 1526400), 337800, 0.7855956032719836, None),
    "some roles": Row(
        Las("las", 3, "zero"),
        (17748, 79616, 383040),
        79616,
        0.8126013787510138,
        10273,
        tuple(role for role in ROLES if role not in UNCONVERTED),
    ),
}


@dataclass
class Run:
    """A stepped run, or a dense one: its counters, every call of a linear layer (inputs, weights), and
    what every neuron coded, with its planes [planes, ...] and its parameters."""

    counters: pd.DataFrame
    conversion: Conversion | None
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    coded: list[tuple[Tensor, Tensor, Params]] = field(default_factory=list)


@contextmanager
def calls_of_layers() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect inputs and weights of every call of a linear layer, one a plane where spikes enter."""
    calls: list[tuple[Tensor, Tensor]] = []
    linear = functional.linear

    def called(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(x, Coded):
            every = [plane for each in x.planes.accumulators for plane in each.plane]
            calls.extend((plane.to(weight.dtype), weight) for plane in every)
        else:
            calls.append((x, weight))
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", called)
        yield calls


@contextmanager
def planes_of_neurons() -> Iterator[list[tuple[Tensor, Tensor, Params]]]:
    """Collect what every neuron of a stepped run is given, its planes and its parameters. Blocks of
    attention have one query each, and so no masked key."""
    coded: list[tuple[Tensor, Tensor, Params]] = []
    original = stepped.planes

    def seen(coding, x, params):
        value, count = original(coding, x, params)
        every = [plane for each in value.accumulators for plane in each.plane]
        coded.append((x, torch.stack(every), params))
        return value, count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepped, "planes", seen)
        patch.setattr(attention, "QUERY_BLOCK", 1)
        patch.setattr(attention, "SPIKES", 1)
        yield coded


def run(model: PreTrainedModel, conversion: Conversion | None, ids: Tensor) -> Run:
    """Run a model step by step on ids [samples, length]."""
    counters = Counters(find_sites(model), "cpu")
    execution = "fast" if conversion is None else "stepped"
    with (
        calls_of_layers() as calls,
        planes_of_neurons() as coded,
        torch.no_grad(),
        patched(model, conversion, counters, execution),
    ):
        model(ids, use_cache=False)
    return Run(counters.of(conversion), conversion, calls, coded)


def run_of(
    row: Row,
    model: PreTrainedModel,
    convert: Callable[..., Conversion],
    tokens: Callable[..., Tensor],
) -> Run:
    """Run a row of ROWS on the tiny Llama, which becomes float64."""
    model.double()
    conversion = None if row.coding is None else convert(model, row.coding, row.roles)
    return run(model, conversion, tokens(SAMPLES, LENGTH))


def potentials(run: Run, timesteps: int) -> Iterator[list[Tensor]]:
    """The membrane potentials of every neuron of LAS before its first step and after each: it fires at
    2^-t and is lowered by as much. They are computed from its values alone, and its spikes must be these.
    """
    for x, planes, params in run.coded:
        v = x.abs().float() / params["scale"]
        levels = [v]
        for t in range(1, timesteps + 1):
            fires = v >= 2.0**-t
            assert torch.equal(planes[t - 1].abs().bool(), fires)
            v = v - 2.0**-t * fires
            levels.append(v)
        yield levels
