#!/usr/bin/env bash
# neurobench 2.3.0: synaptic operations of a layer pruned by torch.nn.utils.prune are sums of its weights.
#
# NeuroBench counts what a layer computes by a deep copy of it whose weights are set to 1 where they are
# not zero. The copy keeps the hooks of the layer. That of torch.nn.utils.prune, which works until
# prune.remove, makes the weight anew from `weight_orig` and the mask at every call, so that the copy
# multiplies by the real weights, and their sum is reported as a number of operations, Dense too; it may
# be negative for other weights. ConnectionSparsity of the same benchmark is right. Any other hook of a
# layer runs in the copy, too, on inputs of ones: one that quantises or encodes what enters makes other
# counts of it, and one that counts calls counts these.
#
# Seen with torch 2.13.0, snntorch 0.9.4: half of 100 x 50 weights pruned, real inputs, one sample:
#   pruned:  {'ConnectionSparsity': 0.5, 'SynapticOperations': {'Effective_MACs': 3.921875, 'Effective_ACs': 0.0, 'Dense': 3.921875}}
#   removed: {'ConnectionSparsity': 0.5, 'SynapticOperations': {'Effective_MACs': 2500.0, 'Effective_ACs': 0.0, 'Dense': 5000.0}}
#
# Exits 0 while that is so, 1 once both are the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 tqdm==4.67.1
"$folder/venv/bin/pip" install --quiet --no-deps neurobench==2.3.0 snntorch==0.9.4  # not torchaudio
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import ConnectionSparsity
from neurobench.metrics.workload import SynapticOperations
from neurobench.models import TorchModel
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset


def measured(network, inputs):
    data = DataLoader(TensorDataset(inputs, torch.zeros(len(inputs))), batch_size=len(inputs))
    metrics = [[ConnectionSparsity], [SynapticOperations]]
    with torch.no_grad():
        return Benchmark(TorchModel(network), data, [], [], metrics).run(quiet=True)


torch.manual_seed(0)
inputs = torch.rand(64, 100) + 0.1  # none is zero
network = nn.Sequential(nn.Linear(100, 50, bias=False))
prune.random_unstructured(network[0], "weight", 0.5)
before = measured(network, inputs)
prune.remove(network[0], "weight")  # the same weights without a hook
after = measured(network, inputs)
print("pruned: ", before)
print("removed:", after)
right = after["SynapticOperations"]["Dense"] == 100 * 50
sys.exit(0 if right and abs(before["SynapticOperations"]["Dense"]) < 1000 else 1)
PYTHON
