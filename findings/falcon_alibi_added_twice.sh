#!/usr/bin/env bash
# transformers 5.24.0: Falcon with ALiBi adds its bias twice under eager attention, once under SDPA.
#
# With alibi=True (falcon-rw) the decoder puts the scaled bias into the causal mask, "to integrate alibi
# bias in the causal mask". SDPA is given that mask and nothing else. Eager attention adds the bias to the
# scores, scales them, and adds the mask, which has it once more. So the same weights are another model
# where attn_implementation="eager" or output_attentions=True; SDPA, the default, is the trained one.
#
# Seen with transformers 5.24.0, torch 2.13.0 (largest difference of logits, two random layers):
#     eager - SDPA 0.66 (largest logit 6.1); eager with half the bias - SDPA 3e-06
#
# Exits 0 while that is so, 1 once both give the same logits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon import modeling_falcon

ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))


def logits(attention):
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        initializer_range=0.3,
    )
    model = FalconForCausalLM._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        return model(ids, use_cache=False).logits


eager, sdpa = logits("eager"), logits("sdpa")
whole = modeling_falcon.build_alibi_tensor
modeling_falcon.build_alibi_tensor = lambda *args, **kwargs: whole(*args, **kwargs) / 2
halved = logits("eager")
far, near = (float((each - sdpa).abs().max()) for each in (eager, halved))
print(f"eager - SDPA {far:.2g} (largest logit {float(sdpa.abs().max()):.2g}); half the bias {near:.1g}")
sys.exit(0 if far > 0.01 > near else 1)
PYTHON
