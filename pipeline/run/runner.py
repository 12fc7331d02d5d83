"""Runs the six stages of one configuration, each from the store if it is there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from pipeline.results.results import collect
from pipeline.run import checks, inputs
from pipeline.run.chain import Chain, chain
from pipeline.run.devices import resolve
from pipeline.run.settings import Settings
from pipeline.store.provenance import versions
from pipeline.store.store import Artifact, Store
from stages import evaluation as evaluating
from stages import export as exporting
from stages.analysis.operations import operations, untransformed
from stages.analysis.real_valued import real_valued
from stages.compiler import compiled, use_compiler
from stages.distribution import Densities
from stages.energy import account, saving, summary
from stages.fitted import Conversion, FittedNeurons
from stages.model.sites import find_sites, select
from stages.sketch import SketchSet
from stages.statistics import measuring
from stages.text import corpus as text

log = logging.getLogger(__name__)


@dataclass
class Run:
    """The steps of one configuration and the artifacts that are there, by label in their order."""

    store: Store
    chain: Chain
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return self.chain.settings

    @property
    def model(self) -> inputs.ModelSource:
        return self.chain.model

    def build(self, label: str, make: Callable[[Path], None]) -> Artifact:
        """The artifact of a step, logged with its seconds or as a hit."""
        artifact = self.store.build(self.chain.steps[label], make)
        state = "cached" if artifact.hit else "built"
        log.info("%-24s %-6s %s  %.1f s", label, state, artifact.key[:8], artifact.seconds)
        self.artifacts[label] = artifact
        return artifact


def start(settings: Settings) -> Run:
    """Finds the device and the steps; nothing is loaded or built before it is needed."""
    checks.configured(settings)
    runtime = settings.runtime
    device = resolve(runtime.device)
    root = Path(settings.store.path)
    use_compiler(runtime.compile, (root / ".compiled").absolute())
    store = Store(root, runtime={**asdict(runtime), "device": device})
    return Run(store, chain(settings, store, device))


def stored(settings: Settings) -> tuple[Run, list[str]]:
    """A run as the store holds it, without building anything, and the labels of what is missing."""
    store = Store(Path(settings.store.path))
    run = Run(store, chain(settings, store))
    found = {label: store.find(step) for label, step in run.chain.steps.items()}
    run.artifacts = {label: artifact for label, artifact in found.items() if artifact is not None}
    return run, [label for label in found if label not in run.artifacts]


def execute(
    settings: Settings, command: str = "python -m pipeline"
) -> tuple[dict[str, Any], pd.DataFrame, Run]:
    """All stages of one run: the result, the per-site table, and the artifacts behind them.

    `command` is the one that an exported model says it was made by.
    """
    run = start(settings)
    if settings.export.enabled:
        settings.export.check_free(run.chain.key("export"))
    checks.complete(run)
    if "prefix" in run.chain.steps:
        _prefix(run)
        checks.behind_prefix(run)
    conversion = convert(run) if settings.coding.converts else None
    _perplexities(run, conversion)
    if "evaluation anytime" in run.chain.steps:
        assert conversion is not None
        _anytime(run, conversion)
    _accuracies(run, conversion)
    _energy(run, conversion)
    if settings.export.enabled:
        assert conversion is not None
        _export(run, conversion, command)
    row, sites = collect(run)
    return row | {"compiled": compiled()}, sites, run


def _calibration(run: Run, model: inputs.ModelSource) -> Artifact:
    corpus = run.settings.corpus[run.settings.calibration.corpus]
    return inputs.tokens(corpus, "calibration", model, run.store)


def _calibration_windows(run: Run, model: inputs.ModelSource) -> torch.Tensor:
    """The ids [windows, length] that everything is measured and fitted on."""
    spec, ids = run.settings.calibration, inputs.load_tokens(_calibration(run, model))
    return _windows(run, ids, spec.windows, spec.length, spec.corpus)


def _windows(
    run: Run, ids: torch.Tensor, count: int, length: int, name: str, skip: int = 0
) -> torch.Tensor:
    """Windows [count, length] of a corpus' ids, as the model wants them to begin."""
    return text.windows(ids, count, length, skip, name, run.settings.model.begin)


def _prefix(run: Run) -> None:
    """The tokens that a transform keeps in front of every text, found on the untouched model."""
    s = run.settings
    search: Any = s.transform.search

    def make(out: Path) -> None:
        ids = _calibration_windows(run, run.model.plain)
        model, tokenizer = run.model.plain.load()
        result = search.run(model, tokenizer, ids, s.runtime.batch)
        (out / inputs.PREFIX).write_text(json.dumps(result, indent=1))

    run.build("prefix", make)


def convert(run: Run) -> Conversion:
    """Stages 1 to 4: capture, distribution, fitting, patching."""
    s, spec = run.settings, run.settings.calibration
    coding = s.coding
    statistics = _statistics(run)  # first, as some are not defined on every model

    def sketch(out: Path) -> None:
        ids = _calibration_windows(run, run.model)
        model, _ = run.model.load()
        sites = select(find_sites(model), s.sites)
        s.capture.run(model, ids, sites, s.runtime.batch).save(out)

    sketches = run.build("capture", sketch)
    densities = run.build(
        "distribution",
        lambda out: s.distribution.run(SketchSet.load(sketches.path)).save(out),
    )

    def fit(out: Path) -> None:
        tensors = {
            name: load_file(a.path / "statistic.safetensors") for name, a in statistics.items()
        }
        fitting = s.fitting.for_coding(coding)
        fitting.run(Densities.load(densities.path), coding, tensors).save(out)

    conversion = Conversion(coding, FittedNeurons.load(run.build("fitting", fit).path))

    def measure(out: Path) -> None:
        ids, skip = inputs.load_tokens(_calibration(run, run.model)), spec.windows * spec.length
        held_out = _windows(run, ids, s.patching.windows, spec.length, spec.corpus, skip)
        model, _ = run.model.load()
        frame = s.patching.run(model, held_out, conversion, s.runtime.batch)
        frame.to_parquet(out / "sites.parquet")
        log.info("%d sites converted, compiled kernels: %s", len(frame), compiled())

    run.build("patching", measure)
    return conversion


def _statistics(run: Run) -> dict[str, Artifact]:
    """What the coding needs beyond the distribution, each its own artifact by its name."""
    s = run.settings
    found = {}
    for statistic in s.coding.statistics:

        def measure(out: Path, statistic: Any = statistic) -> None:
            ids = _calibration_windows(run, run.model)
            model, _ = run.model.load()
            sites = select(find_sites(model), s.sites)
            tensors = measuring(statistic)(model, ids, sites, s.runtime.batch)
            save_file(tensors, out / "statistic.safetensors")

        found[statistic.name] = run.build(f"statistics {statistic.name}", measure)
    return found


def _perplexities(run: Run, conversion: Conversion | None) -> None:
    s, spec = run.settings, run.settings.evaluation
    for name in spec.corpora:

        def make(out: Path, name: str = name) -> None:
            ids = _evaluation_windows(run, name)
            model, _ = run.model.load()
            batch = s.runtime.evaluation_batch
            how = s.runtime.execution
            if how == "stepped":
                log.info("stepped; on real values: %s", ", ".join(real_valued(model)))
            evaluating.perplexity(model, ids, conversion, batch, name, how).save(out)

        run.build(f"evaluation ppl_{name}", make)


def _evaluation_windows(run: Run, name: str) -> torch.Tensor:
    """The ids [windows, length] of a corpus that a perplexity is measured on."""
    s, spec = run.settings, run.settings.evaluation
    tokens = inputs.tokens(s.corpus[name], "evaluation", run.model, run.store)
    return _windows(run, inputs.load_tokens(tokens), spec.windows, spec.length, name)


def _anytime(run: Run, conversion: Conversion) -> None:
    """Perplexity of the first corpus after each step of the neurons."""
    name, batch = run.settings.evaluation.corpora[0], run.settings.runtime.evaluation_batch

    def make(out: Path) -> None:
        ids = _evaluation_windows(run, name)
        model, _ = run.model.load()
        found = evaluating.anytime(model, ids, conversion, batch, name)
        (out / "anytime.json").write_text(json.dumps(found, indent=1))

    run.build("evaluation anytime", make)


def _accuracies(run: Run, conversion: Conversion | None) -> None:
    s, spec = run.settings, run.settings.evaluation
    specs = [s.tasks[name] for name in spec.tasks]
    for task in specs:

        def make(out: Path, task: Any = task) -> None:
            questions = [(task, inputs.question_file(task, specs, run.store))]
            model, tokenizer = run.model.load()
            batch = s.runtime.task_batch
            scores = evaluating.accuracy(
                model, tokenizer, conversion, questions, spec.items, batch, s.runtime.execution
            )
            (out / "metrics.json").write_text(json.dumps(scores[task.name], indent=1))

        run.build(f"evaluation acc_{task.name}", make)


def _energy(run: Run, conversion: Conversion | None) -> None:
    """Cost of every operation, and sums by convention and phase, on the first corpus' counters."""
    s = run.settings
    corpus = s.evaluation.corpora[0]
    tokens = s.energy.tokens or s.evaluation.length

    def make(out: Path) -> None:
        model, _ = run.model.load()
        plan = operations(model, find_sites(model))
        dense = account(untransformed(plan), s.energy, tokens)
        spiking = account(plan, s.energy, tokens)
        if conversion is not None:
            source = run.artifacts[f"evaluation ppl_{corpus}"].path
            counters = evaluating.Perplexity.load(source).counters
            spiking = account(plan, s.energy, tokens, counters, conversion.coding)
        spiking.to_parquet(out / "operations.parquet")
        totals = {"total": summary(spiking), "saving": saving(spiking, dense)}
        (out / "summary.json").write_text(json.dumps(totals, indent=1))

    run.build("energy", make)


def _export(run: Run, conversion: Conversion, command: str) -> None:
    """The converted model in a folder, with what the other stages measured on its card."""
    s = run.settings

    def make(out: Path) -> None:
        row, _ = collect(run)
        told = {
            name: text for name, text in versions().items() if name in exporting.PACKAGES and text
        }
        tokens, profile = s.energy.tokens or s.evaluation.length, s.energy.profile.name
        energy = f"prefill of {tokens} tokens, causal convention, {profile}"
        number = len(conversion.neurons.sites)
        card = exporting.card(row, number, command, told, energy)
        model, tokenizer = run.model.load()
        exporting.run(model, tokenizer, conversion, s.transform, card, out)

    artifact = run.build("export", make)
    s.export.place(artifact.path, artifact.key)
    log.info("exported: %s", s.export.folder or artifact.path)
