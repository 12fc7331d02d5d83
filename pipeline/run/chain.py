"""The stages of one configuration: every artifact and what it is made from, before any is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.run import evaluations, stages
from pipeline.run.measured import Evaluated, Measured, part
from pipeline.run.models import ModelSource, model_source
from pipeline.run.settings import Settings
from pipeline.run.stage import Source, Stage, sources
from pipeline.run.texts import Tokens
from pipeline.store.store import Store
from stages.codings.dense import Dense
from stages.fits.statistics import Statistic
from stages.text.corpus import ALL, Purpose


@dataclass
class Chain:
    """The stages of one run. Those of a conversion are missing where the model stays dense."""

    settings: Settings
    model: ModelSource
    measured: Measured[Stage]
    tokens: dict[tuple[str, Purpose], Tokens]  # where stages read more or less, the most
    prefix: stages.Prefix | None = None
    statistics: dict[str, stages.Statistics] = field(default_factory=dict)
    capture: stages.Captured | None = None
    distribution: stages.Estimated | None = None
    fitting: stages.Fitted | None = None
    patching: stages.Patched | None = None
    export: stages.Exported | None = None

    @cached_property
    def steps(self) -> dict[str, Stage]:
        """The stages by their labels, in the order in which a run builds them."""
        # Statistics come first, as some are not defined on every model.
        fitted = (self.capture, self.distribution, self.fitting, self.patching)
        conversion = (self.prefix, *self.statistics.values(), *fitted)
        made = self.measured
        measured = (*made.evaluated, made.anytime, made.energy, *(made.dense or ()))
        every = (*conversion, *measured, self.export)
        return {stage.label: stage for stage in every if stage is not None}

    @cached_property
    def sources(self) -> dict[str, Stage]:
        """What the stages are made from: the model's file, the texts, the questions."""
        steps = {stage.key() for stage in self.steps.values()}
        below = (source for stage in self.steps.values() for source in sources(stage))
        return {source.label: source for source in below if source.key() not in steps}

    @property
    def stored(self) -> bool:
        """Whether the store has every step; none of them is read."""
        holds = self.model.store.holds
        return all(holds(step.name, step.key()) for step in self.steps.values())


def chain(
    settings: Settings, store: Store, device: str = "cpu", known: ModelSource | None = None
) -> Chain:
    """All stages of a run. Raises InputError where a model, text or file that it names is missing.

    `known` stands in for the model of the settings where nobody can say its key.
    """
    s = settings
    model = known or model_source(s.model, store, device, s.runtime.offload)
    tokens: dict[tuple[str, Purpose], Tokens] = {}

    def read(name: str, purpose: Purpose, needed: int | None) -> dict[str, Source]:
        tokens[name, purpose] = Tokens.of(s.corpus[name], purpose, model, needed)
        return {"model": model, "tokens": tokens[name, purpose]}

    def calibrated(more: int = 0) -> dict[str, Source]:
        needed = (s.calibration.windows + more) * s.calibration.length
        return read(s.calibration.corpus, "calibration", needed)

    parts: dict[str, Any] = {}
    search: Any = s.transform.search
    if search is not None:
        parts["prefix"] = stages.Prefix.on(s, {"search": search}, calibrated())
    model = model.transformed(s.transform, parts.get("prefix"))
    if s.coding.converts:
        parts |= _conversion(s, calibrated(), calibrated(s.patching.windows))
    count = s.evaluation.windows
    needed = None if count == ALL else count * s.evaluation.length
    texts = {name: read(name, "evaluation", needed) for name in s.evaluation.corpora}
    fitted = {"fitting": parts["fitting"]} if "fitting" in parts else {}
    evaluated = _evaluated(s, texts, model, fitted)
    # The same artifacts as those of a dense row with this transform.
    dense = _evaluated(s, texts, model, {}, dense=True) if s.coding.converts else None
    first = s.evaluation.corpora[0]
    energy = evaluations.Energy.of(s, model, evaluated.perplexities[first][0])
    anytime = None
    if s.evaluation.anytime and fitted:
        anytime = evaluations.Anytime.of(s, first, texts[first] | fitted)
    measured: Measured[Any] = Measured(evaluated, energy, parts.get("patching"), anytime, dense)
    if s.export.enabled:
        parts["export"] = stages.Exported.of(s, model, parts["fitting"], measured)
    return Chain(s, model, measured, tokens, **parts)


def _conversion(
    s: Settings, read: dict[str, Source], held_out: dict[str, Source]
) -> dict[str, Any]:
    """The stages from capture to patching, by the fields of the chain; `held_out` reads further."""
    statistics: dict[str, stages.Statistics] = {}
    for statistic in s.coding.statistics:
        _measured(s, statistic, read, statistics)
    capture = stages.Captured.of(s, read)
    distribution = stages.Estimated.of(s, capture)
    declared = {each.name: statistics[each.name] for each in s.coding.statistics}
    fitting = stages.Fitted.of(s, distribution, declared)
    patching = stages.Patched.of(s, {**held_out, "fitting": fitting})
    return {
        "statistics": statistics,
        "capture": capture,
        "distribution": distribution,
        "fitting": fitting,
        "patching": patching,
    }


def _measured(
    s: Settings,
    statistic: Statistic,
    read: Mapping[str, Source],
    statistics: dict[str, stages.Statistics],
) -> stages.Statistics:
    """The stage of a statistic, and into `statistics` before it those of what it needs."""
    needed = {each.name: _measured(s, each, read, statistics) for each in statistic.needs}
    made = stages.Statistics.of(s, statistic, {**read, **needed})
    return statistics.setdefault(statistic.name, made)


def _evaluated(
    s: Settings,
    texts: Mapping[str, Mapping[str, Source]],
    model: ModelSource,
    fitted: Mapping[str, Source],
    dense: bool = False,
) -> Evaluated[Any]:
    """The evaluations of the run's coding, or of the `dense` model that it is compared with."""
    coding, read = Dense() if dense else s.coding, s.evaluation
    made: dict[str, Stage] = {}
    for number, perturbation in enumerate(read.perturbations):
        for name in read.corpora:
            label = part("ppl", name, number, dense)
            spec = evaluations.read(s, coding, perturbation)
            made[label] = evaluations.Perplexity.of(spec, name, {**texts[name], **fitted}, label)
        for name in read.tasks:
            label = part("acc", name, number, dense)
            spec, made_from = evaluations.asked(s, coding, perturbation), {"model": model, **fitted}
            made[label] = evaluations.Accuracy.of(spec, s.tasks[name], made_from, label)
    return Evaluated.of(read.corpora, read.tasks, read.replicates, made.__getitem__, dense)
