"""`make bench`: what spiking costs, as ratios to the dense model of the same process on the default model.

The dense model is the one that a user runs: transformers' default attention (SDPA) and nothing attached.
Each ratio is the median over rounds in which both run in turn, so that a machine whose speed drifts moves
both. Nothing is asserted here. `python -m tests.benchmarks prefill_2048 decode` measures these rows only.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import save_file
from torch import Tensor

import stages
from pipeline.run import runner
from pipeline.run.memory import keep_freed_memory
from pipeline.run.settings import Settings
from pipeline.run.texts import load_tokens
from stages.api import bind, fit, restore
from stages.codings.base import Coding
from stages.compiler import compiled
from stages.evaluation import perplexity
from stages.fitted import Conversion
from stages.model.sites import find_sites
from stages.ports.counters import Counters
from stages.ports.patched import patched
from stages.text import corpus
from tests.benchmarks import peaks, timed

CONF = Path(__file__).parents[2] / "conf"
ROUNDS = 5
OTHERS = ("signed_price", "gated_budget", "timed", "multigrain")
CALIBRATION = (8, 512)
PROMPT, GENERATED = 128, 64
STEPPED = 512
Work = Callable[[], Any]


class Bench:
    """The default model, its text, and the ratios that were measured so far."""

    def __init__(self, overrides: list[str]) -> None:
        settings = configured(["coding=gated", "coding.timesteps=6", "coding.grains=2", *overrides])
        run = runner.start(settings)
        self.settings = settings
        self.model, _ = run.model.load()
        text = run.chain.tokens[settings.calibration.corpus, "calibration"]
        self.ids = load_tokens(text.build(run.store, run.runtime))
        self.windows = corpus.windows(self.ids, *CALIBRATION)
        self.figures: dict[str, Any] = {"threads": torch.get_num_threads()}
        self.conversion = self.fitted(settings.coding, CALIBRATION[0])

    def fitted(self, coding: Any, windows: int) -> Conversion:
        return fit(self.model, self.windows[:windows], coding)

    def text(self, tokens: int) -> Tensor:
        return self.ids[None, :tokens].long().to(self.model.device)

    def prefill(self, ids: Tensor) -> None:
        with torch.inference_mode():
            self.model(ids, use_cache=False, logits_to_keep=1)

    def spiking(self, ids: Tensor, conversion: Conversion, counted: bool = False) -> None:
        counters = Counters(find_sites(self.model), ids.device) if counted else None
        with patched(self.model, conversion, counters):
            self.prefill(ids)

    def show(self, name: str, value: float, goal: str = "") -> None:
        self.figures[name] = round(value, 3)
        print(f"{name:40s} {value:9.3f}   {goal}", flush=True)

    def ratio(self, name: str, dense: Work, work: Work, goal: str, rounds: int = ROUNDS) -> None:
        """Median ratio of the second to the first, after one run of each."""
        dense(), work()
        pairs = [(timed(dense)[0], timed(work)[0]) for _ in range(rounds)]
        self.show(f"{name}_s", statistics.median(pair[1] for pair in pairs))
        self.show(name, statistics.median(b / a for a, b in pairs), f"goal {goal}")


def main() -> None:
    """Prints one line a figure, and all of them as json at the end."""
    # An empty cache, so that compilation is measured and not read from disk.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp())
    keep_freed_memory()
    chosen = [word for word in sys.argv[1:] if "=" not in word]
    unknown = set(chosen) - set(ROWS)
    if unknown:
        sys.exit(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    bench = Bench([word for word in sys.argv[1:] if "=" in word])
    for name in chosen or ROWS:
        ROWS[name](bench)
    bench.figures["compiled"] = compiled()
    print(json.dumps(bench.figures, indent=1))


def configured(overrides: list[str]) -> Settings:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return instantiate(compose("config", ["experiment=none", *overrides]))


def prefill(tokens: int, goals: tuple[str, str], rounds: int) -> Callable[[Bench], None]:
    def rows(bench: Bench) -> None:
        ids, neurons = bench.text(tokens), bench.conversion
        first = timed(lambda: bench.spiking(ids, neurons))[0]
        for suffix, counted, goal in zip(("", "_counted"), (False, True), goals, strict=True):
            bench.ratio(
                f"prefill_{tokens}{suffix}_over_sdpa",
                lambda: bench.prefill(ids),
                lambda counted=counted: bench.spiking(ids, neurons, counted),
                goal,
                rounds,
            )
        if not suffix:
            bench.show("compilation_s", first - bench.figures[f"prefill_{tokens}_over_sdpa_s"])

    return rows


def memory(bench: Bench) -> None:
    """Largest resident sizes of processes of their own, over one pass of 8192 tokens."""
    folder = Path(tempfile.mkdtemp())
    bind(bench.model, bench.conversion)
    stages.save(bench.model, folder)
    restore(bench.model)
    save_file({"ids": bench.text(8192)}, folder / peaks.TEXT)
    sizes = peaks.of(folder)
    bench.show("memory_8192_GB", sizes["spiking"])
    bench.show("memory_8192_over_sdpa", sizes["spiking"] / sizes["dense"], "goal <= 1.2")


def decode(bench: Bench) -> None:
    """Tokens a second at batch 1, of a model that was converted before."""
    prompt = bench.text(PROMPT)
    settings = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False}

    def generate() -> None:
        bench.model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)

    generate()
    pairs = []
    for _ in range(3):
        dense = statistics.mean(timed(generate)[0] for _ in range(2))
        bind(bench.model, bench.conversion)
        generate()  # the tables of codes are made
        pairs.append((dense, statistics.mean(timed(generate)[0] for _ in range(2))))
        restore(bench.model)
    spiking = GENERATED / statistics.median(pair[1] for pair in pairs)
    bench.show("decode_tokens_per_s", spiking)
    ratio = statistics.median(b / a for a, b in pairs)
    bench.show("decode_dense_over_spiking", ratio, "goal <= 1.2")


def capture(bench: Bench) -> None:
    batch, sites = bench.settings.runtime.batch, find_sites(bench.model)

    def plain() -> None:
        with torch.inference_mode():
            for window in bench.windows.split(batch):
                ids = window.long().to(bench.model.device)
                bench.model(ids, use_cache=False, logits_to_keep=1)

    def sketch() -> Any:
        return bench.settings.capture.run(bench.model, bench.windows, sites, batch)

    bench.ratio("capture_over_sdpa", plain, sketch, "<= 1.2", 3)


def scored(bench: Bench) -> None:
    ids = corpus.windows(bench.ids, 8, 1024)
    works = [
        lambda conversion=conversion: perplexity(bench.model, ids, conversion, 1, "calibration")
        for conversion in (None, bench.conversion)
    ]
    bench.ratio("perplexity_over_dense", works[0], works[1], "<= 1.2", 3)


def stepped(bench: Bench) -> None:
    ids, coding = bench.text(STEPPED), bench.conversion.coding

    def steps() -> None:
        with patched(bench.model, bench.conversion, execution="stepped"):
            bench.prefill(ids)

    fast: Work = lambda: bench.spiking(ids, bench.conversion)  # noqa: E731
    bench.ratio("stepped_over_fast", fast, steps, f"<= {1.5 * coding.timesteps}", 3)


def others(bench: Bench) -> None:
    ids = bench.text(2048)
    for name in OTHERS:
        conversion = bench.fitted(brief(name), 2)
        bench.ratio(
            f"prefill_2048_{name}_over_sdpa",
            lambda: bench.prefill(ids),
            lambda conversion=conversion: bench.spiking(ids, conversion),
            "<= 1.3",
            3,
        )


def brief(name: str) -> Coding:
    """A coding whose sensitivity is measured on one window: what is timed does not ask for more."""
    grains = ["coding.grains=2"] if name == "multigrain" else []
    coding: Any = configured([f"coding={name}", *grains]).coding
    sensitivity = getattr(coding, "sensitivity", None)
    if sensitivity is not None:
        coding = replace(coding, sensitivity=replace(sensitivity, windows=1))
    return coding  # type: ignore[no-any-return]


ROWS: dict[str, Callable[[Bench], None]] = {
    "prefill_2048": prefill(2048, ("<= 1.25", "<= 1.4"), ROUNDS),
    "decode": decode,
    "capture": capture,
    "perplexity": scored,
    "stepped": stepped,
    "others": others,
    "prefill_8192": prefill(8192, ("<= 1.5", "<= 1.7"), 1),
    "memory": memory,
}

if __name__ == "__main__":
    main()
