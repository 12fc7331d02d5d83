"""`python -m tests.benchmarks.overheads FOLDER`: what stages cost beside products, for conf/plan.

Runs a model on one thread and takes seconds of its processor, which other processes on the machine
disturb less than time. What a pass takes beyond its products is given in passes over memory: of the dense
model for every number of an element-wise step, of the others for every value at a site.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from stages.analysis.operations import operations
from stages.analysis.work import Work, work
from stages.capture import Capture
from stages.codings.gated import Gated
from stages.distribution import Distribution
from stages.evaluation import perplexity
from stages.fitted import Conversion
from stages.fitting import Fitting
from stages.model.forward import windows
from stages.model.loading import load
from stages.model.products import products
from stages.model.sites import find_sites
from stages.patching import Patching

ROUNDS = 5
PASS = 2 * 4  # bytes of a number that is read and written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="of a model, float32")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    options: Any = {"dtype": "float32", "device": "cpu", "revision": None, "device_map": None}
    model, _ = load(args.folder, **options)
    with torch.inference_mode():
        print(json.dumps(overheads(model, args.length, args.windows), indent=1))
    return 0


def overheads(model: Any, length: int, number: int) -> dict[str, float]:
    """The rates of one core, and passes by the names of `plan.overhead`."""
    sites = find_sites(model)
    plan = operations(model, sites)
    last, whole = work(plan, sites, length, 1), work(plan, sites, length)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (number, length), generator=generator)
    made = rates(model.config.hidden_size, model.config.intermediate_size)

    def seconds(run: Callable[[torch.Tensor], Any]) -> float:
        run(ids[:1])  # compiles
        return cpu(lambda: run(ids)) / number

    def passes(run: Callable[[torch.Tensor], Any], one: Work, dense: float) -> float:
        return (seconds(run) - dense) * made["memory"] / (one.values * PASS)

    dense = {n: seconds(lambda x, n=n: windows(model, x, 1, "dense", logits=n)) for n in (1, 0)}
    rest = dense[1] - 2 * last.macs / made["flops"]
    made["elements"] = rest * made["memory"] / (last.elements * PASS)
    made["capture"] = passes(lambda x: Capture().run(model, x, sites, 1), last, dense[1])
    densities = Distribution().run(Capture().run(model, ids, sites, 1))
    coding = Gated("gated", 6, 2)
    begin = time.process_time()
    conversion = Conversion(coding, Fitting("atoms", 1, 0).run(densities, coding))
    made["fitting"] = (time.process_time() - begin) / len(sites)
    made["patching"] = passes(lambda x: Patching().run(model, x, conversion, 1), last, dense[1])
    for name, neurons, counted in (
        ("dense_counted", None, True),
        ("spiking", conversion, False),
        ("counted", conversion, True),
    ):
        run = lambda x, n=neurons, c=counted: perplexity(model, x, n, 1, "random", counted=c)  # noqa: E731
        made[name] = passes(run, whole, dense[0])
    return {name: float(f"{value:.3g}") for name, value in made.items()}


def rates(width: int, inner: int) -> dict[str, float]:
    """Operations a second of a product of the model's MLP, bytes a second of a copy."""
    x, layer = torch.randn(512, width), torch.nn.Linear(width, inner, bias=False)
    source = torch.ones(1 << 24)
    copy = torch.empty_like(source)
    with products(layer):  # by the library that passes multiply with
        product = min(cpu(lambda: layer(x)) for _ in range(ROUNDS))
    copied = min(cpu(lambda: copy.copy_(source)) for _ in range(ROUNDS))
    return {"flops": 2 * 512 * width * inner / product, "memory": PASS * len(source) / copied}


def cpu(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


if __name__ == "__main__":
    sys.exit(main())
