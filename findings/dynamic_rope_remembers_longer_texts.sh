#!/usr/bin/env bash
# transformers 5.24.0: dynamic RoPE at the trained length depends on what the process ran before.
#
# With rope_type "dynamic" a text longer than max_position_embeddings sets the frequencies for its length
# and the module keeps them. They are put back by a text that is shorter than max_position_embeddings,
# but not by one of just that many tokens, the length at which perplexities are usually measured, nor by
# one between that and the longest so far. So the same model gives the same input other logits after a
# longer text, and a mean over windows depends on their order. No cache is used anywhere here.
#
# Seen with transformers 5.24.0, torch 2.13.0 (16 trained positions, texts of n tokens, largest
# difference of the logits from those of a fresh model):
#     after 40 tokens: n=15 0, n=16 3.8, n=24 1.9
#
# Exits 0 while that is so, 1 once every length gives what a fresh model does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TRAINED = 16


def fresh():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TRAINED,
        initializer_range=0.3,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    return LlamaForCausalLM(config).eval()


torch.manual_seed(1)
longer = torch.randint(0, 50, (1, 40))
differences = {}
with torch.no_grad():
    for length in (TRAINED - 1, TRAINED, TRAINED + 8):
        text = longer[:, :length]
        alone, used = fresh(), fresh()
        used(longer, use_cache=False)
        first = alone(text, use_cache=False).logits
        differences[length] = float((used(text, use_cache=False).logits - first).abs().max())
print("after 40 tokens:", ", ".join(f"n={n} {d:.2g}" for n, d in differences.items()))
shorter, same, between = differences.values()
sys.exit(0 if shorter == 0 and same > 0.01 and between > 0.01 else 1)
PYTHON
