#!/usr/bin/env bash
# transformers 5.24.0, accelerate 1.15.0: Trainer.evaluate gives GPT-2 a loss that is too low by 1/L.
#
# A model's loss over a text of L tokens is the mean over the L - 1 tokens that have one before them. Trainer
# has the model sum and divide by a count of labels instead, which leaves out the first token of each row only
# if a loss is registered for the name of the model's class. One is for `...ForCausalLM`, none for
# `GPT2LMHeadModel`: its loss_type is None, its loss falls back to that of ForCausalLM, but the count does not,
# and takes in all L. So exp(eval_loss) is the perplexity of Llama, but not that of GPT-2, in the same program. A
# text of 1024 tokens hides the factor (1 in 1000), short ones do not. model(input_ids, labels=...) is right.
# The count was mended for the registered losses: https://github.com/huggingface/transformers/pull/46204
#
# Seen with transformers 5.24.0, torch 2.13.0 (texts of 8 tokens, eval_loss / mean cross-entropy of 7):
#     GPT2LMHeadModel None 0.8750 (its own loss 1.0000); LlamaForCausalLM ForCausalLM 1.0000 (its own loss 1.0000)
#
# Exits 0 while that is so, 1 once both ratios are 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/run.py" <<'PY'
import sys

import torch
from torch.nn.functional import cross_entropy
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer,
                          TrainingArguments)

LENGTH = 8
texts = torch.randint(0, 50, (6, LENGTH), generator=torch.Generator().manual_seed(0))
rows = [{"input_ids": text, "labels": text} for text in texts]
torch.manual_seed(0)
gpt2 = GPT2LMHeadModel(GPT2Config(
    vocab_size=50, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
llama = LlamaForCausalLM(LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))

ratios, parts = [], []
for model in (gpt2.eval(), llama.eval()):
    with torch.no_grad():
        output = model(input_ids=texts, labels=texts)
    mean = cross_entropy(output.logits[:, :-1].flatten(0, 1), texts[:, 1:].flatten())
    options = TrainingArguments(
        sys.argv[1], per_device_eval_batch_size=3, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, options, eval_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    loss = trainer.evaluate()["eval_loss"]
    ratios.append((loss / mean.item(), output.loss.item() / mean.item()))
    parts.append(f"{type(model).__name__} {model.loss_type} {ratios[-1][0]:.4f} (its own loss {ratios[-1][1]:.4f})")
print("; ".join(parts))
expected = [((LENGTH - 1) / LENGTH, 1), (1, 1)]
sys.exit(0 if torch.allclose(torch.tensor(ratios), torch.tensor(expected), atol=1e-4) else 1)
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" || { code=$?; tail -3 "$folder/log"; exit $code; }
