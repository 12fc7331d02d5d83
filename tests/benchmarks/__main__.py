"""`make bench`: the speed of every stage as ratios measured in one run, on the default model.

Each figure is the median of a few repetitions taken in turn with what it is compared with, so that a
machine whose speed drifts moves both. Nothing is asserted here.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from pipeline.run import inputs, runner
from pipeline.run.settings import Settings
from stages.codings.base import site_params
from stages.compiler import compiled
from stages.distribution import Densities, Distribution
from stages.fitted import Conversion
from stages.model.sites import find_sites, select
from stages.neurons.spikes import decode
from stages.ports.kernels import row_kernel
from stages.ports.patched import patched
from stages.text import corpus
from tests.benchmarks import timed

CONF = Path(__file__).parents[2] / "conf"
REPEATS = 3


def main() -> None:
    """Prints one line a figure, and all of them as json at the end."""
    # An empty cache, so that compilation is measured and not read from disk.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    settings = configured(["coding=gated", *sys.argv[1:]])
    run = runner.start(settings)
    model, _ = run.model.load()
    spec = settings.calibration
    tokens = inputs.tokens(settings.corpus[spec.corpus], "calibration", run.model, run.store)
    ids = corpus.windows(inputs.load_tokens(tokens), spec.windows, spec.length)
    figures: dict[str, Any] = {"threads": torch.get_num_threads()}
    with torch.inference_mode():
        densities = capture(figures, settings, model, ids)
    fitted = fitting(figures, densities)
    with torch.inference_mode():
        forward(figures, model, inputs.load_tokens(tokens), fitted["gated"])
        fast_path(figures, densities, fitted["gated"], model.device)
    print(json.dumps(figures, indent=1))


def configured(overrides: list[str]) -> Settings:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return instantiate(compose("config", ["experiment=none", *overrides]))


def in_turn(*works: Callable[[], Any]) -> list[float]:
    """Median seconds of each, measured in turn."""
    rounds = [[timed(work)[0] for work in works] for _ in range(REPEATS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def show(figures: dict[str, Any], name: str, value: float, goal: str) -> None:
    figures[name] = round(value, 3)
    print(f"{name:46s} {value:9.3f}   goal {goal}", flush=True)


def capture(figures: dict[str, Any], settings: Settings, model: Any, ids: Tensor) -> Densities:
    sites = select(find_sites(model), settings.sites)
    batch = settings.runtime.batch

    def plain() -> None:
        for window in ids.split(batch):
            model(window.to(model.device), use_cache=False)

    def sketch() -> Any:
        return settings.capture.run(model, ids, sites, batch)

    show(figures, "capture_first_s", timed(sketch)[0], "with compilation")
    dense, captured = in_turn(plain, sketch)
    show(figures, "capture_s", captured, "-")
    show(figures, "capture_over_plain_forward", captured / dense, "<= 2")
    seconds, densities = timed(lambda: Distribution().run(sketch()))
    show(figures, "distribution_s", seconds - captured, "-")
    return densities


def fitting(figures: dict[str, Any], densities: Densities) -> dict[str, Conversion]:
    fitted = {}
    for name, goal in (("gated", "<= 5"), ("multigrain", "<= 60")):
        settings = configured([f"coding={name}", "coding.timesteps=6", "coding.grains=2"])
        spec = settings.fitting.for_coding(settings.coding)  # type: ignore[arg-type]
        seconds, found = timed(lambda s=settings, f=spec: f.run(densities, s.coding))
        show(figures, f"fitting_{name}_s", seconds, goal)
        fitted[name] = Conversion(settings.coding, found)  # type: ignore[arg-type]
    return fitted


def fast_path(
    figures: dict[str, Any], densities: Densities, conversion: Conversion, device: torch.device
) -> None:
    """One layer's MLP input of 2048 tokens, coded both ways."""
    coding = conversion.coding
    params = site_params(conversion.neurons.fit.params, densities.roles.index("mlp.down"))
    x = torch.randn(2048, 1536, generator=torch.Generator().manual_seed(0)).to(device)
    params = {name: value.to(device) for name, value in params.items()}
    kernel = row_kernel(coding, counted=True)
    kernel(x, params)

    def stepped() -> Any:
        spikes = coding.encode(x, params)
        return decode(spikes, coding.table(params)), spikes.count.sum(-1)

    slow, fast = in_turn(stepped, lambda: kernel(x, params))
    show(figures, "encode_decode_over_fast_path", slow / fast, ">= 5")


def forward(figures: dict[str, Any], model: Any, ids: Tensor, conversion: Conversion) -> None:
    window = ids[None, :2048].to(model.device)

    def dense() -> None:
        model(window, use_cache=False)

    def spiking() -> None:
        with patched(model, conversion):
            model(window, use_cache=False)

    first = timed(spiking)[0]
    plain, coded = in_turn(dense, spiking)
    show(figures, "compilation_s", max(0.0, first - coded), "<= 30, once a process")
    show(figures, "dense_forward_s", plain, "-")
    show(figures, "patched_over_dense_forward", coded / plain, "<= 1.3")
    figures["compiled"] = compiled()


if __name__ == "__main__":
    main()
