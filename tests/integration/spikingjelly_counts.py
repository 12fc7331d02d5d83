"""spikingjelly 2.0.0 counts the operations of stepped runs as PyTorch dispatches them.

No part of the test suite (its name has no test_). It installs the package in a temporary folder, without
its dependencies (torchaudio and torchvision would not fit every torch):

    python -m pytest -s tests/integration/spikingjelly_counts.py

What it prints is recorded in `tests/analysis/layer_calls.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.analysis import neurobench
from stages.model.sites import find_sites
from stages.ports.counters import Counters
from stages.ports.patched import patched
from tests.analysis.layer_calls import LENGTH, ROWS, SAMPLES
from tests.integration.packages import installed

aten = torch.ops.aten


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("packages")
    with installed(folder, "spikingjelly==2.0.0", "loguru==0.7.3"):
        yield


@pytest.mark.parametrize("name", ROWS)
def test_linear_layers(model, convert, tokens, name: str) -> None:
    """Linear layers are dispatched as `aten.mm`, products of attention as `aten.bmm`."""
    from spikingjelly.activation_based.op_counter import (
        ACCounter,
        DispatchCounterMode,
        MACCounter,
    )

    row = ROWS[name]
    model.double()
    conversion = None if row.coding is None else convert(model, row.coding, row.roles)
    counters = Counters(find_sites(model), "cpu")
    spikes = ACCounter(extra_rules={aten.mm.default: additions})
    counter, execution = (spikes, "stepped") if conversion else (MACCounter(), "fast")
    with (
        torch.no_grad(),
        patched(model, conversion, counters, execution),
        DispatchCounterMode([counter]),
    ):
        model(tokens(SAMPLES, LENGTH), use_cache=False)
    theirs = counter.records["Global"][aten.mm.default] / SAMPLES
    print(name, theirs)
    ours = neurobench.metrics(model, counters.of(conversion), SAMPLES, conversion)
    kind = "Effective_ACs" if conversion else "Effective_MACs"
    assert ours["SynapticOperations"][kind] == theirs == row.spikingjelly


def additions(args: tuple[Any, ...], kwargs: Any, out: Tensor) -> int:
    """What the spikes of the left operand select; the counter's rule knows those in {0, 1} alone."""
    x, weight = args
    ternary = bool(((x == 0) | (x.abs() == 1)).all())
    return int(x.count_nonzero()) * weight.shape[1] if ternary else 0
