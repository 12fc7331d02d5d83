"""`python -m tests.benchmarks.offload`: how much memory a model needs whose layers stay on disk.

Writes a checkpoint of random bfloat16 weights in the shape of a model in conf/model (or given below),
shard by shard, and converts it in a process of its own: capture of 8 x 512 tokens, gated n=2 T=6
neurons at every site, perplexity of one window of 512 tokens with them. Prints seconds and the largest
resident size of every stage. Random weights have no outliers: the figures tell memory and time, not
quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast

from pipeline.run.memory import keep_freed_memory
from stages.capture import Capture
from stages.codings.gated import Gated
from stages.distribution import Distribution
from stages.evaluation import perplexity
from stages.fitted import Conversion
from stages.fitting import Fitting
from stages.model.loading import load_offloaded, meta_model
from stages.model.offload import Offload, offloaded
from stages.model.sites import find_sites
from tests.benchmarks import timed

CONF = Path(__file__).parents[2] / "conf/model"
WINDOWS, LENGTH = 8, 512
FREE_GB = 40
TINYLLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a file of conf/model, or tinyllama-1.1b")
    parser.add_argument("--folder", type=Path, default=Path("outputs/offload"))
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model has")
    parser.add_argument("--dtype", default="float32", help="what is computed in")
    parser.add_argument("--boundary", default="memory")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(convert(args.folder, args.dtype, args.boundary)))
        return 0
    dims = shape(args.model, args.layers)
    args.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.folder).free / 1e9
    if free < FREE_GB:
        print(f"skipped: {free:.0f} GB free in {args.folder}, needs {FREE_GB}")
        return 0
    folder = args.folder / args.model
    seconds, size = timed(lambda: write(dims, folder))
    print(
        f"{args.model}: {dims['num_hidden_layers']} layers, {size / 1e9:.2f} GB in {seconds:.0f} s"
    )
    command = [sys.executable, "-m", "tests.benchmarks.offload", args.model, "--run"]
    command += ["--folder", str(folder), "--dtype", args.dtype, "--boundary", args.boundary]
    try:
        code = subprocess.run(command, check=False).returncode
        if code:
            print(f"{args.model}: its process ended with {code}", flush=True)
        return code
    finally:
        if not args.keep:
            shutil.rmtree(folder)


def shape(name: str, layers: int | None) -> dict[str, Any]:
    dims = TINYLLAMA
    if name != "tinyllama-1.1b":
        dims = yaml.safe_load((CONF / f"{name}.yaml").read_text())["dims"]
    return dims | ({} if layers is None else {"num_hidden_layers": layers})


def write(dims: dict[str, Any], folder: Path) -> int:
    """Random weights, one shard a layer, of which one at a time is in memory; their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    model = meta_model(dims)
    tied = set(model.all_tied_weights_keys)
    groups: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, weight in model.named_parameters():
        group = name.split(".")[2] if ".layers." in name else name
        groups.setdefault(group, []).append((name, weight.shape))
    shards: dict[str, str] = {}
    generator, total = torch.Generator().manual_seed(0), 0
    for number, members in enumerate(groups.values()):
        file = f"model-{number:05d}.safetensors"
        tensors = {n: weights(s, generator) for n, s in members if n not in tied}
        shards |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fields = {k: v for k, v in dims.items() if k != "model_type"}
    AutoConfig.for_model(dims["model_type"], **fields, dtype="bfloat16").save_pretrained(folder)
    vocab = {str(number): number for number in range(100)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return total


def weights(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 0.02


class Peak(threading.Thread):
    """The largest resident sizes since it was last asked, in GB: `VmRSS`, and `RssAnon` alone,
    without the pages of mapped files, which the system takes back when it wants."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._largest: dict[str, float] = {}

    def run(self) -> None:
        while True:
            for name, size in self._sizes():
                self._largest[name] = max(size, self._largest.get(name, 0.0))
            time.sleep(0.02)

    def take(self) -> dict[str, float]:
        largest, self._largest = self._largest, {}
        return {name: round(size, 3) for name, size in largest.items()}

    def _sizes(self) -> Iterator[tuple[str, float]]:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("VmRSS", "RssAnon"):
                yield name, int(rest.split()[0]) * 1024 / 1e9


def convert(folder: Path, dtype: str, boundary: str) -> dict[str, Any]:
    """Seconds and peaks of every stage, printed as each ends."""
    keep_freed_memory(offloaded=True)  # as the pipeline does
    peak, stages = Peak(), {}
    peak.start()

    def stage(name: str, work: Callable[[], Any]) -> Any:
        peak.take()
        seconds, value = timed(work)
        stages[name] = {"seconds": round(seconds, 1)} | peak.take()
        print(name, json.dumps(stages[name]), flush=True)
        return value

    spec = Offload(boundary)
    model, _ = stage(
        "load",
        lambda: load_offloaded(str(folder), dtype=dtype, device="cpu", revision=None, offload=spec),
    )
    found = offloaded(model)
    assert found is not None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (WINDOWS + 1, LENGTH), generator=generator)
    sites, coding = find_sites(model), Gated("gated", 6, 2)
    sketches = stage("capture", lambda: Capture().run(model, ids[:-1], sites, 1))
    densities = stage("distribution", lambda: Distribution().run(sketches))
    fitting = Fitting("atoms", 1, 0)
    neurons = stage("fitting", lambda: fitting.run(densities, coding))
    conversion = Conversion(coding, neurons)
    result = stage("perplexity", lambda: perplexity(model, ids[-1:], conversion, 1, "random"))
    largest = max(stage["VmRSS"] for stage in stages.values())
    return {"sites": len(sites), "perplexity": result.metrics["perplexity"], "peak_GB": largest}


if __name__ == "__main__":
    sys.exit(main())
