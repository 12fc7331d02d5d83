#!/usr/bin/env bash
# transformers 5.24.0, gguf 0.19.0, accelerate 1.15.0, torch 2.13.0 (CPU)
#
# from_pretrained(gguf_file=...) takes from the metadata of a GGUF file the keys that its table for the
# architecture names; another key that changes what the model computes is left out, and the default of the config
# class stands in its place. No warning, no missing and no unexpected key; the weights are right, the logits those
# of another model. Among the keys that are left out:
#   starcoder2  rope.freq_base: every StarCoder2 gets the base 10000, whatever it was trained with
#   gemma3      rope.scaling.type and .factor: Gemma 3 from 4B on has 8 here, of the layers with full attention
#   stablelm    rope.dimension_count: always a quarter of each head is rotated
#   gemma2      attn_logit_softcapping and final_logit_softcapping: always 50 and 30
#               (https://github.com/huggingface/transformers/pull/42881 was to read the former)
#
# Output seen (largest difference of the logits from those of the model that the file was written from; the same
# for the weights read from the file under that model's own config; largest logit):
#   starcoder2 rope.freq_base 1e6: 4.2, 0 (6.6)
#   gemma3 rope.scaling.factor 8: 0.16, 0 (6.8)
#   stablelm rope.dimension_count 16 of 16: 7.1, 0 (6.1)
#   gemma2 final_logit_softcapping 3: 3.9, 0 (2.9)
#
# Exits 0 while all four are so, 1 once one of them is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import pathlib
import sys

import gguf
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, StableLmConfig, Starcoder2Config

root = pathlib.Path(sys.argv[1])
WIDTH, HEADS, LAYERS, TOKENS, CONTEXT = 32, 2, 6, 64, 128
shape = dict(vocab_size=TOKENS, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
             num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=CONTEXT,
             initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=True)
gemma = shape | dict(head_dim=16, sliding_window=64)
gemma_keys = dict(layer_norm_rms_eps=1e-6, key_length=16, value_length=16, sliding_window=64)
plain = {"rope_type": "default", "rope_theta": 1e4}
cases = {
    "starcoder2 rope.freq_base 1e6": (
        Starcoder2Config(**shape, rope_parameters=plain | {"rope_theta": 1e6}),
        dict(layer_norm_eps=1e-5, rope_freq_base=1e6)),
    "gemma3 rope.scaling.factor 8": (
        Gemma3TextConfig(**gemma, rope_parameters={
            "sliding_attention": plain,
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}),
        gemma_keys | dict(rope_freq_base=1e6, rope_scaling_type=gguf.RopeScalingType.LINEAR, rope_scaling_factor=8.0)),
    "stablelm rope.dimension_count 16 of 16": (
        StableLmConfig(**shape, rope_parameters=plain | {"partial_rotary_factor": 1.0}),
        dict(layer_norm_eps=1e-5, rope_dimension_count=16)),
    "gemma2 final_logit_softcapping 3": (
        Gemma2Config(**gemma, final_logit_softcapping=3.0),
        gemma_keys | dict(rope_freq_base=1e4, attn_logit_softcapping=50.0, final_logit_softcapping=3.0)),
}


def write(path, architecture, model, keys):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{token}" for token in range(TOKENS)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, LAYERS)
    for name, tensor in model.named_parameters():
        # The format keeps Gemma's norms as the factor itself, the model as its distance from 1.
        kept = tensor + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else tensor
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), kept.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ids = torch.arange(48)[None]
differences = []
for title, (config, keys) in cases.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    architecture = title.split()[0]
    write(root / "tiny.gguf", architecture, model, keys)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        root, gguf_file="tiny.gguf", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    configured = AutoModelForCausalLM.from_config(config).eval()
    configured.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        expected, *got = (each(ids).logits for each in (model, loaded, configured))
    lost, kept = ((logits - expected).abs().max().item() for logits in got)
    differences.append((lost, kept))
    print(f"{title}: {lost:.2g}, {kept:.1g} ({expected.abs().max().item():.2g})")
sys.exit(0 if all(lost > 0.01 > kept for lost, kept in differences) else 1)
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" || { code=$?; tail -3 "$folder/log"; exit $code; }
