"""`python -m tests.benchmarks.peaks FOLDER dense|spiking`: the memory of one pass, in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import stages
from pipeline.run.memory import keep_freed_memory

KINDS = ("dense", "spiking")
TEXT = "ids.safetensors"  # ids [1, S]


def of(folder: Path) -> dict[str, float]:
    """Largest resident size in GB during a pass of the saved model over `TEXT` [1, S], of each kind."""
    sizes = {}
    for kind in KINDS:
        command = [sys.executable, "-m", "tests.benchmarks.peaks", str(folder), kind]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        sizes[kind] = float(json.loads(done.stdout.splitlines()[-1]))
    return sizes


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    keep_freed_memory()
    model = stages.load(folder)
    if kind == "dense":
        stages.restore(model)
    ids = load_file(folder / TEXT)["ids"]
    Path("/proc/self/clear_refs").write_text("5")  # loading is over: the peak begins anew
    with torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)
    status = Path("/proc/self/status").read_text()
    print(json.dumps(int(status.split("VmHWM:")[1].split()[0]) / 1e6))


if __name__ == "__main__":
    main()
