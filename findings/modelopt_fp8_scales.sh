#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU), safetensors 0.8.0
#
# A checkpoint that NVIDIA's ModelOpt has quantised to FP8 holds float8 codes (`x.weight`) and scales
# (`x.weight_scale`, `x.input_scale`); `hf_quant_config.json` beside config.json, and in newer ones
# `quantization_config.quant_method: modelopt`, say so. transformers reads neither: from_pretrained
# casts the codes to the requested dtype, leaves the scales out, and returns a model whose weights are
# wrong by the factor 1/scale. There is no error: the scales are in `unexpected_keys`, and a table on
# the log says "can be ignored when loading from different task/architecture". The result may look
# like a model: norms undo most of the factor (a random Llama of two layers: perplexity 313, right 300).
#
# Output seen, of three folders of which the first has no word on quantisation at all:
#   codes only        raised: False  weight / right weight: 1792.0  unexpected: ['.input_scale', '.weight_scale']
#   hf_quant_config   raised: False  weight / right weight: 1792.0  unexpected: ['.input_scale', '.weight_scale']
#   quant_method      raised: False  weight / right weight: 1792.0  unexpected: ['.input_scale', '.weight_scale']
#
# Exit status 0 while that is so, 1 once one of them is refused or dequantised.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import json, pathlib, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

root = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
model = LlamaForCausalLM(config)
NAME, SCALE = "model.layers.0.mlp.down_proj", 2.0**-8 / 7
same = []
for case in ("codes only", "hf_quant_config", "quant_method"):
    folder = root / case.replace(" ", "_")
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    codes = (tensors[f"{NAME}.weight"] / SCALE).to(torch.float8_e4m3fn)
    right = codes.float() * SCALE
    tensors |= {f"{NAME}.weight": codes, f"{NAME}.weight_scale": torch.tensor(SCALE),
                f"{NAME}.input_scale": torch.tensor(1.0)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if case == "hf_quant_config":
        text = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
        (folder / "hf_quant_config.json").write_text(json.dumps(text))
    if case == "quant_method":
        file = folder / "config.json"
        method = {"quant_method": "modelopt", "quant_algo": "FP8"}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": method}))
    try:
        found, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        print(f"{case:16}  raised: {error}")
        same.append(False)
        continue
    weight = found.get_parameter(f"{NAME}.weight").detach()
    ratio = float((weight / right)[right != 0].median())
    unread = sorted(name.removeprefix(NAME) for name in report["unexpected_keys"])
    print(f"{case:16}  raised: False  weight / right weight: {ratio:.1f}  unexpected: {unread}")
    same.append(torch.equal(weight, codes.float()) and unread == [".input_scale", ".weight_scale"])
sys.exit(0 if all(same) else 1)
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/log" || { code=$?; tail -3 "$folder/log"; exit $code; }
