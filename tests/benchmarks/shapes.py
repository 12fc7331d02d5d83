"""`python -m tests.benchmarks.shapes`: a conversion on one device, by a model's shape alone.

Fills a model of the shape of a file in conf/model with random weights, in memory, and converts it: capture
of 8 x 512 tokens, gated n=2 T=6 neurons at every site, then the patched forward pass over the dense one on
2048 tokens. Prints seconds of every stage and what the device's memory held at most. Random weights have
no outliers: the figures tell time and memory, not quality.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.capture import Capture
from stages.codings.gated import Gated
from stages.compiler import compiled
from stages.distribution import Distribution
from stages.evaluation import perplexity
from stages.fitted import Conversion
from stages.fitting import Fitting
from stages.model.sites import find_sites
from stages.ports.counters import Counters
from stages.ports.patched import patched
from tests.benchmarks import timed
from tests.benchmarks.offload import LENGTH, WINDOWS, shape

REPEATS, TOKENS = 5, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a file of conf/model, or tinyllama-1.1b")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    figures: dict[str, Any] = {"model": args.model, "device": args.device, "dtype": args.dtype}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        seconds, value = timed(work)
        figures[f"{name}_s"] = round(seconds, 2)
        print(f"{name:24s} {seconds:9.2f} s", flush=True)
        return value

    dtype = getattr(torch, args.dtype)
    model = stage("load", lambda: filled(shape(args.model, args.layers), args.device, dtype))
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(1)
    length = max(LENGTH, TOKENS)
    ids = torch.randint(0, model.config.vocab_size, (WINDOWS + 1, length), generator=generator)
    sites, coding = find_sites(model), Gated("gated", 6, 2)
    figures["sites"] = len(sites)
    windows = ids[:-1, :LENGTH]
    stage("capture_first", lambda: Capture().run(model, windows[:1], sites, 1))
    sketches = stage("capture", lambda: Capture().run(model, windows, sites, WINDOWS))
    densities = stage("distribution", lambda: Distribution().run(sketches))
    neurons = stage("fitting", lambda: Fitting("atoms", 1, 0).run(densities, coding))
    conversion = Conversion(coding, neurons)
    text = ids[-1:, :TOKENS]
    stage("perplexity_first", lambda: perplexity(model, text, conversion, 1, "random"))
    stage("perplexity", lambda: perplexity(model, text, conversion, 1, "random"))
    figures |= forward(model, conversion, text.to(args.device))
    if args.device.startswith("cuda"):
        figures["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    print(json.dumps(figures))


def filled(dims: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A model of random weights, made on the device."""
    torch.manual_seed(0)
    fields = {k: v for k, v in dims.items() if k != "model_type"}
    config = AutoConfig.for_model(dims["model_type"], **fields)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def forward(model: Any, conversion: Conversion, ids: torch.Tensor) -> dict[str, Any]:
    """Milliseconds of the model as transformers runs it, of the patched one, and of that with its
    spikes counted; medians, measured in turn."""
    counters = Counters(find_sites(model), ids.device)

    def dense() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    def spiking(counted: Counters | None = None) -> None:
        with patched(model, conversion, counted):
            model(ids, use_cache=False, logits_to_keep=1)

    works = {"dense": dense, "patched": spiking, "counted": lambda: spiking(counters)}
    with torch.inference_mode():
        for work in works.values():
            work()
        rounds = [[timed(work)[0] for work in works.values()] for _ in range(REPEATS)]
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    found = {f"{name}_ms": round(1e3 * s, 2) for name, s in zip(works, medians, strict=True)}
    found["patched_over_dense"] = round(medians[1] / medians[0], 3)
    found["counted_over_dense"] = round(medians[2] / medians[0], 3)
    print(json.dumps(found), flush=True)
    return found | {"compiled": compiled()}


if __name__ == "__main__":
    main()
