"""The stages of a run, each declared once: its spec, its inputs, the code that computes it, its files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors.torch import load_file, save_file

from pipeline.run.measured import Evaluated, Measured, numbers, per_site
from pipeline.run.models import PREFIX, ModelSource
from pipeline.run.neurons import NeuronFolder
from pipeline.run.shares import Claimed, Cut, batches, passing
from pipeline.run.stage import Source, Stage
from pipeline.run.texts import load_tokens
from pipeline.store.provenance import versions
from stages import export
from stages.compiler import compiled
from stages.distribution import Densities
from stages.fits.statistics import Statistic
from stages.fitted import Conversion, FittedNeurons
from stages.model.shares import Parts
from stages.model.sites import find_sites, select
from stages.sketch import SketchSet
from stages.statistics import Earlier, Meter, by_batch, measuring, measuring_module, meter
from stages.text import corpus

if TYPE_CHECKING:
    from pipeline.run.settings import Settings

log = logging.getLogger(__name__)

Spec = Mapping[str, Any]
Inputs = Mapping[str, Any]
MODEL = ("stages.model.loading", "stages.text.corpus")  # what loads it, and its windows of a text


class Calibrated(Stage):
    """A stage that runs the model on windows of the calibration text."""

    @classmethod
    def on(cls, s: Settings, spec: Spec, made_from: Mapping[str, Source], part: str = "") -> Self:
        """The stage on the settings' windows, whose inputs have a `model` and its `tokens`."""
        calibration = s.calibration
        windows = {"windows": calibration.windows, "length": calibration.length}
        return cls({**spec, **windows, "begin": s.model.begin}, made_from, part)


def windows(spec: Spec, inputs: Inputs) -> torch.Tensor:
    """The ids [windows, length] of calibration, as the model wants them to begin."""
    ids = load_tokens(inputs["tokens"])
    name = "the calibration text"
    return corpus.windows(ids, spec["windows"], spec["length"], 0, name, spec["begin"]).long()


# --- the conversion ----------------------------------------------------------------------------------


class Prefix(Calibrated):
    """The tokens that a transform keeps in front of every text, found on the untouched model."""

    name = "prefix"
    code = MODEL  # and the module of the search

    @staticmethod
    def make(out: Path, spec: Spec, inputs: Inputs, runtime: Any) -> None:
        model, tokenizer = inputs["model"].load()
        result = spec["search"].run(model, tokenizer, windows(spec, inputs), runtime.batch)
        (out / PREFIX).write_text(json.dumps(result, indent=1))


class Statistics(Calibrated):
    """What a coding needs to know beyond the distribution."""

    name = "statistics"

    def modules(self) -> tuple[str, ...]:
        return (*MODEL, measuring_module(self.spec["statistic"]))

    @classmethod
    def of(cls, s: Settings, statistic: Statistic, made_from: Mapping[str, Source]) -> Statistics:
        """Its inputs have also the statistics that it needs, by name."""
        kind = StatisticsByBatch if by_batch(statistic) else Statistics
        return kind.on(s, {"statistic": statistic, "sites": s.sites}, made_from, statistic.name)

    @staticmethod
    def make(out: Path, spec: Spec, inputs: Inputs, runtime: Any) -> None:
        ids = windows(spec, inputs)
        model, _ = inputs["model"].load()
        sites = select(find_sites(model), spec["sites"])
        measure = measuring(spec["statistic"], measured(inputs, spec["statistic"].needs))
        save_file(measure(model, ids, sites, runtime.batch), out / "statistic.safetensors")


def measured(inputs: Inputs, statistics: Iterable[Statistic]) -> Earlier:
    """The tensors of some statistics by name."""
    paths = {each.name: inputs[each.name].path for each in statistics}
    return {name: load_file(path / "statistic.safetensors") for name, path in paths.items()}


class StatisticsByBatch(Statistics, Cut):
    """One that adds up batch by batch."""

    @staticmethod
    def units(spec: Spec, inputs: Inputs, runtime: Any) -> int:
        return batches(*spec["statistic"].reads(spec["windows"], runtime.batch))

    @staticmethod
    def share(claims: Iterable[Claimed], spec: Spec, inputs: Inputs, runtime: Any) -> None:
        count, batch = spec["statistic"].reads(spec["windows"], runtime.batch)
        shares = passing(windows(spec, inputs)[:count], batch, claims)
        metered(spec, inputs).run_shares(shares)

    @staticmethod
    def merge(out: Path, parts: Sequence[Path], spec: Spec, inputs: Inputs, runtime: Any) -> None:
        made = metered(spec, inputs)
        for part in Parts(parts):
            made.merge(part)
        save_file(made.tensors(), out / "statistic.safetensors")


def metered(spec: Spec, inputs: Inputs) -> Meter:
    """The meter of a statistic on the windows of calibration."""
    ids = windows(spec, inputs)
    model, _ = inputs["model"].load()
    sites = select(find_sites(model), spec["sites"])
    earlier = measured(inputs, spec["statistic"].needs)
    return meter(spec["statistic"], model, ids, sites, earlier)


class Captured(Calibrated, Cut):
    """A sketch of the values at every site."""

    name = "capture"
    code = ("stages.capture", *MODEL)

    @classmethod
    def of(cls, s: Settings, made_from: Mapping[str, Source]) -> Self:
        return cls.on(s, {"capture": s.capture, "sites": s.sites}, made_from)

    @staticmethod
    def make(out: Path, spec: Spec, inputs: Inputs, runtime: Any) -> None:
        ids = windows(spec, inputs)
        model, _ = inputs["model"].load()
        sites = select(find_sites(model), spec["sites"])
        spec["capture"].run(model, ids, sites, runtime.batch).save(out)

    @staticmethod
    def units(spec: Spec, inputs: Inputs, runtime: Any) -> int:
        return batches(spec["windows"], runtime.batch)

    @staticmethod
    def share(claims: Iterable[Claimed], spec: Spec, inputs: Inputs, runtime: Any) -> None:
        ids = windows(spec, inputs)
        model, _ = inputs["model"].load()
        sites = select(find_sites(model), spec["sites"])
        spec["capture"].run_shares(model, passing(ids, runtime.batch, claims), sites)

    @staticmethod
    def merge(out: Path, parts: Sequence[Path], spec: Spec, inputs: Inputs, runtime: Any) -> None:
        model, _ = inputs["model"].load()
        sites = select(find_sites(model), spec["sites"])
        spec["capture"].merged(model, sites, Parts(parts)).save(out)


class Estimated(Stage):
    """The distribution of every site."""

    name = "distribution"
    code = ("stages.distribution",)

    @classmethod
    def of(cls, s: Settings, capture: Captured) -> Self:
        return cls({"distribution": s.distribution}, {"capture": capture})

    @staticmethod
    def make(out: Path, spec: Spec, inputs: Inputs, runtime: Any) -> None:
        spec["distribution"].run(SketchSet.load(inputs["capture"].path)).save(out)


class Fitted(Stage):
    """The neurons of every site: fitted, or imported."""

    name = "fitting"
    code = ("stages.fitting",)

    @classmethod
    def of(cls, s: Settings, distribution: Estimated, statistics: Mapping[str, Source]) -> Self:
        spec = {"fitting": s.fitting.for_coding(s.coding), "coding": s.coding}
        made_from: dict[str, Source] = {"distribution": distribution, **statistics}
        if s.fitting.neurons is not None and s.coding.converts:
            made_from["neurons"] = NeuronFolder(Path(s.fitting.neurons).expanduser())
        return cls(spec, made_from)

    @staticmethod
    def make(out: Path, spec: Spec, inputs: Inputs, runtime: Any) -> None:
        densities = Densities.load(inputs["distribution"].path)
        if "neurons" in inputs:
            imported = spec["fitting"].imported(densities, spec["coding"], inputs["neurons"])
            imported.save(out)
            return
        statistics = measured(inputs, spec["coding"].statistics)
        spec["fitting"].run(densities, spec["coding"], statistics).save(out)


def conversion(spec: Spec, inputs: Inputs) -> Conversion | None:
    """The coding of a spec with the neurons that were fitted for it; None for the dense model."""
    if "fitting" not in inputs:
        return None
    return Conversion(spec["coding"], FittedNeurons.load(inputs["fitting"].path))


def held_out(spec: Spec, inputs: Inputs) -> torch.Tensor:
    """The ids [windows, length] behind those of calibration, on which patching measures."""
    ids, length = load_tokens(inputs["tokens"]), spec["length"]
    skip, name = spec["windows"] * length, "the calibration text"
    return corpus.windows(ids, spec["patching"].windows, length, skip, name, spec["begin"]).long()


class Patched(Calibrated, Cut):
    """The error of the neurons on activations that they were not fitted to."""

    name = "patching"
    code = ("stages.patching", *MODEL)

    @classmethod
    def of(cls, s: Settings, made_from: Mapping[str, Source]) -> Self:
        return cls.on(s, {"patching": s.patching, "coding": s.coding}, made_from)

    @staticmethod
    def make(out: Path, spec: Spec, inputs: Inputs, runtime: Any) -> None:
        ids = held_out(spec, inputs)
        model, _ = inputs["model"].load()
        frame = spec["patching"].run(model, ids, conversion(spec, inputs), runtime.batch)
        frame.to_parquet(out / "sites.parquet")
        log.info("%d sites converted, compiled kernels: %s", len(frame), compiled())

    @staticmethod
    def units(spec: Spec, inputs: Inputs, runtime: Any) -> int:
        return batches(spec["patching"].windows, runtime.batch)

    @staticmethod
    def share(claims: Iterable[Claimed], spec: Spec, inputs: Inputs, runtime: Any) -> None:
        ids = held_out(spec, inputs)
        model, _ = inputs["model"].load()
        shares = passing(ids, runtime.batch, claims)
        spec["patching"].run_shares(model, shares, conversion(spec, inputs))

    @staticmethod
    def merge(out: Path, parts: Sequence[Path], spec: Spec, inputs: Inputs, runtime: Any) -> None:
        model, _ = inputs["model"].load()
        frame = spec["patching"].merged(model, conversion(spec, inputs), Parts(parts))
        frame.to_parquet(out / "sites.parquet")


class Exported(Stage):
    """The converted model in a folder, with what was measured on its card."""

    name = "export"
    code = ("stages.export", "stages.checkpoint.folder", "stages.checkpoint.quantizer", *MODEL)

    @classmethod
    def of(cls, s: Settings, model: ModelSource, fitting: Stage, measured: Measured[Stage]) -> Self:
        tokens, profile = s.energy.tokens or s.evaluation.length, s.energy.main.name
        spec: dict[str, Any] = {"coding": s.coding, "sites": s.sites, "axes": s.axes}
        measures = s.evaluation.corpora, s.evaluation.tasks, s.evaluation.replicates
        spec |= {"label": s.name, "evaluated": measures}
        spec["energy"] = f"prefill of {tokens} tokens, causal convention, {profile}"
        stages = {each.part: each for each in (*measured.evaluated, *(measured.dense or ()))}
        made_from: dict[str, Any] = {"model": model, "fitting": fitting, "energy": measured.energy}
        return cls(spec, made_from | {"patching": measured.patching} | stages)

    @staticmethod
    def make(out: Path, spec: Spec, inputs: Inputs, runtime: Any) -> None:
        corpora, tasks, replicates = spec["evaluated"]
        ours = Evaluated.of(corpora, tasks, replicates, inputs.__getitem__)
        dense = Evaluated.of(corpora, tasks, replicates, inputs.__getitem__, dense=True)
        measured = Measured(ours, inputs["energy"], inputs["patching"], dense=dense)
        row = spec["axes"] | {"label": spec["label"], "replicates": replicates}
        row |= numbers(measured, per_site(measured))
        neurons = conversion(spec, inputs)
        assert neurons is not None
        made_with = {n: text for n, text in versions().items() if n in export.PACKAGES and text}
        number = len(neurons.neurons.sites)
        card = export.card(row, number, runtime.command, made_with, spec["energy"])
        model, tokenizer = inputs["model"].load()
        export.run(model, tokenizer, neurons, inputs["model"].transform, card, out)
