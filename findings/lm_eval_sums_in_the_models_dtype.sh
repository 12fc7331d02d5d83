#!/usr/bin/env bash
# lm-eval 0.4.13: HFLM sums log-likelihoods in the dtype of the model unless `softmax_dtype` is given.
# Its log_softmax keeps the dtype of the logits, and the sum over the answer's tokens is taken in it. bfloat16 has 8
# bits: near 130 nats its steps are 1, so that answers tie or change places. `softmax_dtype="float32"` gives the sums in
# float32, of the same logits. Exit status 0 while that is so, 1 if it changes. Output seen with the versions below,
# for four answers and a random model in bfloat16:
#   softmax_dtype=None: -217.000, -51.000, -342.000, -131.000, 0.375 off
#   softmax_dtype=float32: -216.913, -51.102, -341.933, -130.625, 0.000 off
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install torch==2.13.0 transformers==5.24.0 lm_eval==0.4.13 accelerate==1.15.0
"$folder/venv/bin/python" - <<'PY'
import sys
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

vocab = {symbol: i for i, symbol in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>"])}
backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>", pad_token="<s>")
torch.manual_seed(0)
config = LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=4, initializer_range=0.5,
                     bos_token_id=256, eos_token_id=256)
model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
context = "Question: what melts?"
answers = [" the ice in the glass", " snow", " the ice in the glass on the table", " butter and wax"]


def by_hand(answer):
    ids, start = tokenizer(context + answer).input_ids, len(tokenizer(context).input_ids)
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logs[at - 1, ids[at]].item() for at in range(start, len(ids)))


exact, off = [by_hand(answer) for answer in answers], {}
requests = [Instance("loglikelihood", {}, (context, answer), 0) for answer in answers]
for dtype in (None, "float32"):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype=dtype)
    got = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    off[dtype] = max(abs(a - b) for a, b in zip(got, exact, strict=True))
    print(f"softmax_dtype={dtype}: {', '.join(f'{value:.3f}' for value in got)}, {off[dtype]:.3f} off")
sys.exit(0 if off[None] > 0.1 and off["float32"] < 0.01 else 1)
PY
