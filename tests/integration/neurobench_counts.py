"""NeuroBench 2.3.0 counts the planes of stepped runs, as `stages.analysis.neurobench` does.

No part of the test suite (its name has no test_). It installs the package in a temporary folder, without
its dependencies (torchaudio would not fit every torch):

    python -m pytest -s tests/integration/neurobench_counts.py

What it prints is recorded in `tests/analysis/layer_calls.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import stages
from stages.analysis import neurobench
from stages.checkpoint.format import NEURONS
from stages.evaluation import perplexity
from tests.analysis.layer_calls import LENGTH, ROWS, SAMPLES, potentials, run_of
from tests.integration.packages import installed

SAMPLE = (None, (torch.zeros(SAMPLES), None))  # predictions, and data of which samples are counted


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("packages")
    with installed(folder, "neurobench==2.3.0", "snntorch==0.9.4"):
        yield


@pytest.mark.parametrize("name", ROWS)
def test_synaptic_operations(model, convert, tokens, name: str) -> None:
    from neurobench.metrics.utils.layers import single_layer_MACs

    run = run_of(ROWS[name], model, convert, tokens)
    layers = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear)}
    counts = dict.fromkeys(("Effective_MACs", "Effective_ACs", "Dense"), 0)
    for inputs, weight in run.calls:
        effective, spiking = single_layer_MACs(inputs, layers[id(weight)])
        counts["Effective_ACs" if spiking else "Effective_MACs"] += effective
        counts["Dense"] += single_layer_MACs(inputs, layers[id(weight)], total=True)[0]
    theirs = {kind: count / SAMPLES for kind, count in counts.items()}
    print(name, tuple(theirs.values()))
    ours = neurobench.metrics(model, run.counters, SAMPLES, run.conversion)
    assert ours["SynapticOperations"] == theirs
    assert tuple(theirs.values()) == ROWS[name].neurobench


@pytest.mark.parametrize("name", ROWS)
def test_neurons(model, convert, tokens, name: str) -> None:
    """A hook of every neuron holds its potentials and what it sends."""
    from neurobench.metrics.workload import ActivationSparsity, MembraneUpdates

    row = ROWS[name]
    run = run_of(row, model, convert, tokens)
    hooks = [SimpleNamespace(activation_outputs=list(planes)) for _, planes, _ in run.coded]
    sparsity = ActivationSparsity()(SimpleNamespace(activation_hooks=hooks), *SAMPLE)
    ours = neurobench.metrics(model, run.counters, SAMPLES, run.conversion)
    print(name, sparsity)
    assert ours["ActivationSparsity"] == pytest.approx(sparsity, rel=1e-14)
    assert sparsity == row.sparsity
    if row.updates is None:
        return
    hooks = [
        SimpleNamespace(
            layer=None,
            pre_fire_mem_potential=[torch.zeros_like(levels[0]), *levels[:-1]],
            post_fire_mem_potential=levels,
        )
        for levels in potentials(run, 0 if row.coding is None else row.coding.timesteps)
    ]
    updates = MembraneUpdates()(SimpleNamespace(activation_hooks=hooks), *SAMPLE)
    print(name, updates)
    assert ours["MembraneUpdates"] == updates == row.updates


def test_weights(model, convert, tokens) -> None:
    """Of a pruned model, dense and with its neurons among its modules."""
    from neurobench.metrics.static import ConnectionSparsity, Footprint

    for weight in (m.weight for m in model.modules() if isinstance(m, nn.Linear)):
        weight.data[weight.abs() < 0.1] = 0
    run = run_of(ROWS["dense"], model, convert, tokens)
    dense = neurobench.metrics(model, run.counters, SAMPLES, None)
    assert dense["Footprint"] == Footprint()(_network(model))
    sparsity = ConnectionSparsity()(_network(model))
    assert 0.2 < sparsity == round(dense["ConnectionSparsity"], 4)
    coding = stages.Gated(timesteps=5, grains=2)
    conversion = stages.fit(model, tokens(32, 16), coding)
    with_neurons = neurobench.metrics(model, _counted(model, conversion, tokens), 1, conversion)
    stages.convert(model, tokens(32, 16), coding)
    assert getattr(model, NEURONS)
    assert with_neurons["Footprint"] == Footprint()(_network(model)) > dense["Footprint"]


def _counted(model: Any, conversion: Any, tokens: Any) -> Any:
    return perplexity(model, tokens(1, LENGTH), conversion, 1, "tiny").counters


def _network(model: Any) -> Any:
    from neurobench.models import TorchModel

    return TorchModel(model)
