#!/usr/bin/env bash
# torch 2.13.0 (CPU, g++ 12.2): torch.compile makes `x > c` of a float tensor many times slower than eager does.
#
# The kernel looks vectorized, but where the result of a comparison of floats becomes bool or int8 (to be stored,
# or to be added up in int8) its mask is written to memory, taken over value by value and read again
# (VecMask::from in ATen/cpu/vec/vec_mask.h; only masks of 4- and 8-byte types have conversions of their own).
# So the narrow dtype that should save time costs most of it, and a detour by int32 that changes no value makes the
# same kernel faster than eager mode.
#
# Seen with torch 2.13.0, g++ 12.2, x86-64 with AVX-512, one thread (nanoseconds a value; with AVX2, that is with
# torch._inductor.config.cpp.simdlen = 256, both ratios are above 3 as well):
#     to_bool eager 1.5; to_bool compiled 18.1; to_int8 eager 1.7; to_int8 compiled 6.9;
#     by_int32 eager 2.4; by_int32 compiled 0.8
#
# Exits 0 while the compiled comparison to bool takes at least 3 times as long as in eager mode, and the one to int8
# at least twice as long as with the detour, 1 once that is not so. It needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
export TORCHINDUCTOR_CACHE_DIR=$folder/cache
"$folder/venv/bin/python" - <<'PY'
import statistics
import sys
import time

import torch

torch.set_num_threads(1)
x = torch.rand(2**18, generator=torch.Generator().manual_seed(0))


def to_bool(x):
    return x > 0.5


def to_int8(x):
    return (x > 0.5).to(torch.int8)


def by_int32(x):
    return (x > 0.5).to(torch.int32).to(torch.int8)


variants = {}
for function in (to_bool, to_int8, by_int32):
    compiled = torch.compile(function)
    assert torch.equal(compiled(x), function(x))
    variants |= {(function, "eager"): function, (function, "compiled"): compiled}
seconds = {variant: [] for variant in variants}
for _ in range(61):
    for variant, run in variants.items():
        start = time.perf_counter()
        run(x)
        seconds[variant].append(time.perf_counter() - start)
value = {variant: statistics.median(times) / len(x) * 1e9 for variant, times in seconds.items()}
print("; ".join(f"{function.__name__} {mode} {value[function, mode]:.1f}" for function, mode in value))
to_eager = value[to_bool, "compiled"] / value[to_bool, "eager"]
to_detour = value[to_int8, "compiled"] / value[by_int32, "compiled"]
sys.exit(0 if to_eager >= 3 and to_detour >= 2 else 1)
PY
