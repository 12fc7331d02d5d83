"""The steps of one configuration: what determines each artifact, known before any is built.

The runner builds them, tables look them up, a plan counts them and the store's gc keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from pipeline.run import inputs
from pipeline.run.assets import asset_step
from pipeline.run.settings import Settings
from pipeline.store.step import Step
from pipeline.store.store import Store
from stages.model.sources import PackageFile
from stages.statistics import measuring_module
from stages.text.corpus import Corpus, Purpose

# What a stage's result may depend on beyond its own fields: the modules that compute it.
MODULES = {
    "prefix": ("stages.model.loading",),  # and what defines the search
    "capture": ("stages.capture", "stages.model.loading"),
    "distribution": ("stages.distribution",),
    "statistics": ("stages.model.loading",),  # and what measures the statistic
    "fitting": ("stages.fitting",),
    "patching": ("stages.patching", "stages.model.loading"),
    "evaluation": ("stages.evaluation", "stages.model.loading"),
    "energy": ("stages.energy", "stages.analysis.operations"),
    "export": (
        "stages.export",
        "stages.checkpoint.folder",
        "stages.checkpoint.quantizer",
        "stages.model.loading",
    ),
}


@dataclass
class Chain:
    """The steps of one configuration by label, in the order they are needed.

    A label is a stage, or a stage and its part: `capture`, `evaluation ppl_wikipedia`. `sources`
    are the steps whose artifacts these read: the model, the texts, the questions.
    """

    settings: Settings
    model: inputs.ModelSource
    steps: dict[str, Step] = field(default_factory=dict)
    sources: dict[str, Step] = field(default_factory=dict)

    def key(self, label: str) -> str:
        """The key of a step's artifact."""
        return self.steps[label].key()

    def add(self, label: str, spec: Any, keys: Mapping[str, str], *modules: str) -> None:
        """Another step, of the stage that its label begins with; `modules` compute it too."""
        stage = label.partition(" ")[0]
        self.steps[label] = Step(stage, spec, keys, (*MODULES[stage], *modules))

    def tokens(self, name: str, purpose: Purpose) -> str:
        """The key of a corpus' tokens, which are among the sources from now on."""
        corpus = self.settings.corpus[name]
        step = inputs.tokens_step(corpus, purpose, self.model)
        self.sources |= _text_sources(corpus, purpose) | {f"tokens {name} {purpose}": step}
        return step.key()


def chain(settings: Settings, store: Store, device: str = "cpu") -> Chain:
    """All steps of a run. Raises InputError where a model, text or file that it names is missing."""
    found = Chain(
        settings, inputs.model_source(settings.model, store, device, settings.runtime.offload)
    )
    if (file := settings.model.gguf) is not None:
        found.sources |= {"asset model": asset_step(file), "model": inputs.model_step(file)}
    _transform(found)
    fitted: dict[str, str] = {}
    if settings.coding.converts:
        fitted = _conversion(found)
    _evaluation(found, fitted)
    corpus = settings.evaluation.corpora[0]
    energy = replace(settings.energy, tokens=settings.energy.tokens or settings.evaluation.length)
    keys = {"evaluation": found.key(f"evaluation ppl_{corpus}")}
    found.add("energy", {"energy": energy, "coding": settings.coding}, keys)
    if settings.export.enabled:  # whose card tells what all others measured
        measured = {label: found.key(label) for label in found.steps if label not in fitted}
        coding: dict[str, Any] = {"coding": settings.coding, "sites": settings.sites}
        coding |= {"names": [settings.model.name, settings.name]}  # which stand on its card
        found.add("export", coding, {"model": found.model.key} | fitted | measured)
    return found


def _transform(found: Chain) -> None:
    """The prefix that a transform keeps in front of every text, and the transformed model."""
    s = found.settings
    search: Any = s.transform.search
    if search is not None:
        found.add("prefix", {"search": search} | _windows(s), _measured(found))
    found.model = found.model.transformed(s.transform, found.steps.get("prefix"))


def _conversion(found: Chain) -> dict[str, str]:
    """Stages 1 to 4; the key of the fitted neurons."""
    s, keys, windows = found.settings, _measured(found), _windows(found.settings)
    coding = s.coding
    found.add("capture", {"capture": s.capture, "sites": s.sites} | windows, keys)
    found.add("distribution", s.distribution, {"capture": found.key("capture")})
    for statistic in coding.statistics:
        spec = {"statistic": statistic, "sites": s.sites} | windows
        found.add(f"statistics {statistic.name}", spec, keys, measuring_module(statistic))
    found.add(
        "fitting",
        {"fitting": s.fitting.for_coding(coding), "coding": coding},
        {"distribution": found.key("distribution")}
        | {each.name: found.key(f"statistics {each.name}") for each in coding.statistics},
    )
    fitted = {"fitting": found.key("fitting")}
    found.add("patching", {"patching": s.patching, "coding": coding} | windows, keys | fitted)
    return fitted


def _evaluation(found: Chain, fitted: dict[str, str]) -> None:
    s, spec = found.settings, found.settings.evaluation
    windows: dict[str, Any] = {"coding": s.coding, "count": spec.windows, "length": spec.length}
    windows |= _begin(s)
    for name in spec.corpora:
        keys = {"model": found.model.key, "tokens": found.tokens(name, "evaluation")} | fitted
        found.add(f"evaluation ppl_{name}", {"perplexity": name} | windows, keys)
        if spec.anytime and fitted and name == spec.corpora[0]:
            found.add("evaluation anytime", {"anytime": name} | windows, keys)
    for task in (s.tasks[name] for name in spec.tasks):
        if task.path is None and task.package is not None:
            found.sources[f"asset {task.name}"] = asset_step(task.package)
        fields: dict[str, Any] = {"task": replace(task, path=None), "coding": s.coding}
        fields |= {"items": spec.items, "lm_eval": version("lm_eval")}  # whose prompts these are
        keys = {"model": found.model.key, "data": inputs.question_key(task)}
        found.add(f"evaluation acc_{task.name}", fields, keys | fitted)


def _measured(found: Chain) -> dict[str, str]:
    """What every step on the calibration text depends on."""
    tokens = found.tokens(found.settings.calibration.corpus, "calibration")
    return {"model": found.model.key, "tokens": tokens}


def _windows(settings: Settings) -> dict[str, int]:
    calibration = settings.calibration
    return {"windows": calibration.windows, "length": calibration.length} | _begin(settings)


def _begin(settings: Settings) -> dict[str, int]:
    """The token in front of every window, where there is one."""
    begin = settings.model.begin
    return {} if begin is None else {"begin": begin}


def _text_sources(corpus: Corpus, purpose: Purpose) -> dict[str, Step]:
    origin = corpus.origin(purpose)
    if not isinstance(origin, PackageFile):
        return {}
    name = corpus.name
    return {f"asset {name}": asset_step(origin), f"text {name}": inputs.text_step(origin)}
