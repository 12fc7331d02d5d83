#!/usr/bin/env bash
# Every row of the benchmarks that a GPU has, in under eight minutes on one device:
#   tests/benchmarks/gpu.sh [OVERRIDE ...]       as model.path=FOLDER, where the package index is out of reach
# The 7B shape has random bfloat16 weights, made on the device; the other model is the default one, real.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
status=0
timeout 200 "$python" -m tests.benchmarks.shapes llama2-7b --device cuda --dtype bfloat16 || status=1
timeout 260 "$python" -m tests.benchmarks runtime.device=cuda \
  prefill_2048 decode capture perplexity prefill_8192 "$@" || status=1
exit "$status"
