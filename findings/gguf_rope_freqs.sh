#!/usr/bin/env bash
# transformers 5.24.0, gguf 0.19.0, accelerate 1.15.0, torch 2.13.0 (CPU)
#
# A GGUF file of a Llama 3.1, 3.2 or 3.3 keeps the scaling of its rotary frequencies in a tensor,
# `rope_freqs.weight`, that llama.cpp divides them by; its metadata have the base alone. For the
# architecture `llama` transformers reads neither that tensor nor another trace of the scaling:
# from_pretrained(gguf_file=...) gives plain RoPE, and `output_loading_info` has no missing and no
# unexpected key (tensors without a place in the model are skipped before it is made). The logits of a
# long text are those of another model. Likewise for the splitting of text: a file whose
# `tokenizer.ggml.pre` is `smollm` (all SmolLM2) asks for every digit alone in front of GPT-2's words;
# transformers knows 23 other names, and splits by GPT-2's words for this one without a word.
#
# Output seen:
#   rope_freqs.weight of 8: rope_type default, the same frequencies as without it: True, unexpected: set()
#   tokenizer.ggml.pre smollm: 'a\n\n12' -> ['a', 'Ċ', 'Ċ', '12'] (asked for: ['a', 'ĊĊ', '1', '2'])
#
# Exit status 0 while both are so, 1 once one of them changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import pathlib, sys
import gguf, numpy as np, torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

root = pathlib.Path(sys.argv[1])
tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "12"]
random = np.random.default_rng(0)


def write(name, scaled):
    writer = gguf.GGUFWriter(root / name, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["Ċ Ċ", "1 2"])
    shapes = {"token_embd.weight": (len(tokens), 16), "output_norm.weight": (16,)}
    layer = {"attn_norm": (16,), "ffn_norm": (16,)} | dict.fromkeys(
        ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"], (16, 16))
    shapes |= {f"blk.0.{part}.weight": shape for part, shape in layer.items()}
    for part, shape in shapes.items():
        writer.add_tensor(part, random.standard_normal(shape).astype(np.float32))
    if scaled:
        writer.add_tensor("rope_freqs.weight", np.full(4, 8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


frequencies = []
for name, scaled in (("plain.gguf", False), ("scaled.gguf", True)):
    write(name, scaled)
    model, report = AutoModelForCausalLM.from_pretrained(
        root, gguf_file=name, dtype=torch.float32, output_loading_info=True)
    frequencies.append(model.model.rotary_emb.inv_freq)
same = torch.equal(*frequencies)
kind = model.config.rope_parameters["rope_type"]
print(f"rope_freqs.weight of 8: rope_type {kind}, the same frequencies as without it: {same}, "
      f"unexpected: {report['unexpected_keys']}")
pieces = AutoTokenizer.from_pretrained(root, gguf_file="scaled.gguf").tokenize("a\n\n12")
print(f"tokenizer.ggml.pre smollm: 'a\\n\\n12' -> {pieces} (asked for: ['a', 'ĊĊ', '1', '2'])")
sys.exit(0 if same and not report["unexpected_keys"] and pieces == ["a", "Ċ", "Ċ", "12"] else 1)
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" || { code=$?; tail -3 "$folder/log"; exit $code; }
