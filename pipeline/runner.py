"""Runs the six stages of one configuration, each from the store if it is there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from pipeline import inputs
from pipeline.results import per_site, result
from pipeline.settings import Settings
from pipeline.stage import Step
from pipeline.store import Artifact, Store
from stages import evaluation as evaluating
from stages.codings.coding import Coding, Observing
from stages.codings.dense import Dense
from stages.distribution import Densities
from stages.energy import account, saving, summary
from stages.fitting import FittedNeurons
from stages.llm import corpus as text
from stages.llm.kernels import compiled, use_compiler
from stages.llm.operations import operations, untransformed
from stages.llm.sites import find_sites, select
from stages.patching import Conversion
from stages.sketch import SketchSet

log = logging.getLogger(__name__)
# What a stage's result may depend on beyond its own fields: the modules that compute it.
MODULES = {
    "prefix": ("stages.llm.loading",),  # and what defines the search
    "capture": ("stages.capture", "stages.llm.loading"),
    "distribution": ("stages.distribution",),
    "statistics": ("stages.llm.loading",),  # and what defines the statistic
    "fitting": ("stages.fitting",),
    "patching": ("stages.patching", "stages.llm.loading"),
    "evaluation": ("stages.evaluation", "stages.llm.loading"),
    "energy": ("stages.energy", "stages.llm.operations"),
}


@dataclass
class Run:
    """The artifacts of one run, by stage in the order they were needed."""

    settings: Settings
    store: Store
    model: inputs.ModelSource
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    def build(
        self,
        stage: str,
        spec: Any,
        keys: dict[str, str],
        make: Callable[[Path], None],
        part: str = "",
    ) -> Artifact:
        """The artifact of a stage, or of one `part` of it, logged with its seconds or as a hit."""
        artifact = self.store.build(Step(stage, spec, keys, MODULES[stage]), make)
        label = f"{stage} {part}".strip()
        state = "cached" if artifact.hit else "built"
        log.info("%-24s %-6s %s  %.1f s", label, state, artifact.key[:8], artifact.seconds)
        self.artifacts[label] = artifact
        return artifact


def start(settings: Settings) -> Run:
    """Resolves the model and its transform; nothing is loaded before a stage needs it."""
    runtime = settings.runtime
    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    root = Path(settings.store.path)
    use_compiler(runtime.compile, (root / ".compiled").absolute())
    store = Store(root, runtime={**asdict(runtime), "device": device})
    run = Run(settings, store, inputs.model_source(settings.model, store, device))
    prefix = None if settings.transform.search is None else _prefix(run)
    run.model = run.model.transformed(settings.transform, prefix)
    return run


def execute(settings: Settings) -> tuple[dict[str, Any], pd.DataFrame, Run]:
    """All stages of one run: the result, the per-site table, and the artifacts behind them."""
    run = start(settings)
    dense = isinstance(settings.coding, Dense)
    calibration = None if dense and settings.transform.search is None else _calibration(run)
    conversion = None if dense or calibration is None else convert(run, calibration)
    perplexities = _perplexities(run, conversion, calibration)
    accuracies = _accuracies(run, conversion)
    energy = _energy(run, conversion, perplexities)
    sites = per_site(run, perplexities)
    return result(run, perplexities, accuracies, energy, sites), sites, run


def _calibration(run: Run) -> Artifact:
    corpus = run.settings.corpus[run.settings.calibration.corpus]
    return inputs.tokens(corpus, "calibration", run.model, run.store)


def _calibration_windows(run: Run, calibration: Artifact) -> torch.Tensor:
    """The ids [windows, length] that everything is measured and fitted on."""
    spec = run.settings.calibration
    return text.windows(inputs.load_tokens(calibration), **_shape(spec), name=spec.corpus)


def _prefix(run: Run) -> Artifact:
    """The tokens that a transform keeps in front of every text, found on the untouched model."""
    s, spec = run.settings, run.settings.calibration
    search: Any = s.transform.search
    calibration = _calibration(run)

    def make(out: Path) -> None:
        ids = _calibration_windows(run, calibration)
        model, tokenizer = run.model.load()
        result = search.run(model, tokenizer, ids, s.runtime.batch)
        (out / inputs.PREFIX).write_text(json.dumps(result, indent=1))

    keys = {"model": run.model.key, "tokens": calibration.key}
    return run.build("prefix", {"search": search} | _windows(spec), keys, make)


def convert(run: Run, calibration: Artifact) -> Conversion:
    """Stages 1 to 4: capture, distribution, fitting, patching."""
    s, spec = run.settings, run.settings.calibration
    windows = _windows(spec)
    keys = {"model": run.model.key, "tokens": calibration.key}

    def sketch(out: Path) -> None:
        ids = _calibration_windows(run, calibration)
        model, _ = run.model.load()
        sites = select(find_sites(model), s.sites)
        s.capture.run(model, ids, sites, s.runtime.batch).save(out)

    sketches = run.build(
        "capture", {"capture": s.capture, "sites": s.sites} | windows, keys, sketch
    )
    densities = run.build(
        "distribution",
        s.distribution,
        {"capture": sketches.key},
        lambda out: s.distribution.run(SketchSet.load(sketches.path)).save(out),
    )
    coding: Coding = s.coding  # type: ignore[assignment]
    fitting = s.fitting.for_coding(coding)
    measured = _statistics(run, calibration)

    def fit(out: Path) -> None:
        tensors = {
            name: load_file(a.path / "statistic.safetensors") for name, a in measured.items()
        }
        fitting.run(Densities.load(densities.path), coding, tensors).save(out)

    fitted = run.build(
        "fitting",
        {"fitting": fitting, "coding": coding},
        {"distribution": densities.key} | {name: a.key for name, a in measured.items()},
        fit,
    )
    conversion = Conversion(coding, FittedNeurons.load(fitted.path))

    def measure(out: Path) -> None:
        ids = inputs.load_tokens(calibration)
        skip = spec.windows * spec.length
        held_out = text.windows(ids, s.patching.windows, spec.length, skip, name=spec.corpus)
        model, _ = run.model.load()
        frame = s.patching.run(model, held_out, conversion, s.runtime.batch)
        frame.to_parquet(out / "sites.parquet")
        log.info("%d sites converted, compiled kernels: %s", len(frame), compiled())

    spec_patching = {"patching": s.patching, "coding": coding} | windows
    run.build("patching", spec_patching, keys | {"fitting": fitted.key}, measure)
    return conversion


def _statistics(run: Run, calibration: Artifact) -> dict[str, Artifact]:
    """What the coding needs beyond the distribution, each its own artifact by its name."""
    s, spec = run.settings, run.settings.calibration
    if not isinstance(s.coding, Observing):
        return {}
    keys = {"model": run.model.key, "tokens": calibration.key}
    found = {}
    for statistic in s.coding.statistics:

        def measure(out: Path, statistic: Any = statistic) -> None:
            ids = _calibration_windows(run, calibration)
            model, _ = run.model.load()
            sites = select(find_sites(model), s.sites)
            tensors = statistic.run(model, ids, sites, s.runtime.batch)
            save_file(tensors, out / "statistic.safetensors")

        fields = {"statistic": statistic, "sites": s.sites} | _windows(spec)
        name = statistic.name
        found[name] = run.build("statistics", fields, keys, measure, name)
    return found


def _windows(spec: Any) -> dict[str, int]:
    return {"windows": spec.windows, "length": spec.length}


def _shape(spec: Any) -> dict[str, int]:
    return {"count": spec.windows, "length": spec.length}


def _perplexities(
    run: Run, conversion: Conversion | None, calibration: Artifact | None
) -> dict[str, evaluating.Perplexity]:
    s = run.settings
    found = {}
    for name in s.evaluation.corpora:
        tokens = inputs.tokens(s.corpus[name], "evaluation", run.model, run.store)
        if calibration is not None:
            inputs.refuse_overlap(calibration, tokens)

        def make(out: Path, name: str = name, tokens: Artifact = tokens) -> None:
            ids = text.windows(inputs.load_tokens(tokens), **_shape(s.evaluation), name=name)
            model, _ = run.model.load()
            batch = s.runtime.evaluation_batch
            evaluating.perplexity(model, ids, conversion, batch, name).save(out)

        spec = {"perplexity": name, "coding": s.coding} | _shape(s.evaluation)
        keys = {"model": run.model.key, "tokens": tokens.key} | _fitted(run)
        artifact = run.build("evaluation", spec, keys, make, f"ppl_{name}")
        found[name] = evaluating.Perplexity.load(artifact.path)
    return found


def _accuracies(run: Run, conversion: Conversion | None) -> dict[str, dict[str, Any]]:
    s = run.settings
    found = {}
    for spec, path, identity in inputs.questions(
        [s.tasks[n] for n in s.evaluation.tasks], run.store
    ):

        def make(out: Path, spec: Any = spec, path: Path | None = path) -> None:
            model, tokenizer = run.model.load()
            scores = evaluating.accuracy(
                model,
                tokenizer,
                conversion,
                [(spec, path)],
                s.evaluation.items,
                s.runtime.task_batch,
            )
            (out / "metrics.json").write_text(json.dumps(scores[spec.name], indent=1))

        fields = {"task": replace(spec, path=None), "coding": s.coding, "items": s.evaluation.items}
        keys = {"model": run.model.key, "data": identity} | _fitted(run)
        artifact = run.build("evaluation", fields, keys, make, f"acc_{spec.name}")
        found[spec.name] = json.loads((artifact.path / "metrics.json").read_text())
    return found


def _fitted(run: Run) -> dict[str, str]:
    fitted = run.artifacts.get("fitting")
    return {} if fitted is None else {"fitting": fitted.key}


def _energy(
    run: Run, conversion: Conversion | None, perplexities: dict[str, evaluating.Perplexity]
) -> dict[str, Any]:
    """Summary by convention and phase, on the counters of the first corpus."""
    s = run.settings
    corpus = s.evaluation.corpora[0]
    tokens = s.energy.tokens or s.evaluation.length

    def make(out: Path) -> None:
        model, _ = run.model.load()
        plan = operations(model, find_sites(model))
        dense = account(untransformed(plan), s.energy, tokens)
        spiking = account(plan, s.energy, tokens)
        if conversion is not None:
            counters = perplexities[corpus].counters
            spiking = account(plan, s.energy, tokens, counters, conversion.coding)
        spiking.to_parquet(out / "operations.parquet")
        totals = {"total": summary(spiking), "saving": saving(spiking, dense)}
        (out / "summary.json").write_text(json.dumps(totals, indent=1))

    spec = {"energy": replace(s.energy, tokens=tokens), "coding": s.coding}
    source = run.artifacts[f"evaluation ppl_{corpus}"]
    artifact = run.build("energy", spec, {"evaluation": source.key}, make)
    return dict(json.loads((artifact.path / "summary.json").read_text()))
