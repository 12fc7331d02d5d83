#!/usr/bin/env bash
# neurobench 2.3.0: synaptic operations of a bfloat16 network are rounded, those of a float16 one are 0.
#
# The operations of a call are summed up in the dtype of the layer. bfloat16 has eight bits, to which
# the sum is rounded. In float16 it is inf as soon as a call has more than 65504 operations;
# int(inf) raises an error, which the manager of the metrics catches, and reports 0.0 for all of them,
# a number in the place of three. run(quiet=True) says nothing of it; otherwise it is one line among its
# output. A float32 network is counted exactly here, and rounded in its turn where a sum is not exact.
#
# Seen with torch 2.13.0, snntorch 0.9.4: a layer of 576 x 1536 on 64 samples of spikes, counted by hand
# 441912.0 operations a sample:
#   float32:  {'Effective_MACs': 0.0, 'Effective_ACs': 441912.0, 'Dense': 884736.0}
#   bfloat16: {'Effective_MACs': 0.0, 'Effective_ACs': 442368.0, 'Dense': 884736.0}
#   float16:  0.0
#
# Exits 0 while that is so, 1 once all are the same.
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
from neurobench.metrics.workload import SynapticOperations
from neurobench.models import TorchModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
layer = nn.Linear(576, 1536, bias=False)
spikes = (torch.rand(64, 576) < 0.5).float()
by_hand = float(spikes.sum()) * 1536 / 64
print(f"by hand: {by_hand}")
counted = {}
for name in ("float32", "bfloat16", "float16"):
    dtype = getattr(torch, name)
    data = DataLoader(TensorDataset(spikes.to(dtype), torch.zeros(64)), batch_size=64)
    network = TorchModel(nn.Sequential(layer.to(dtype)))
    with torch.no_grad():
        result = Benchmark(network, data, [], [], [[], [SynapticOperations]]).run(quiet=True)
    counted[name] = result["SynapticOperations"]
    print(f"{name}: {counted[name]}")
exact = counted["float32"]["Effective_ACs"] == by_hand
rounded = isinstance(counted["bfloat16"], dict) and counted["bfloat16"]["Effective_ACs"] != by_hand
sys.exit(0 if exact and rounded and counted["float16"] == 0 else 1)
PYTHON
