"""The stages that measure a model, each declared once: perplexity, accuracy, energy."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipeline.run import neurobench, shipped
from pipeline.run.measured import ANYTIME
from pipeline.run.models import ModelSource
from pipeline.run.shares import Claimed, Cut, batches, passing
from pipeline.run.stage import Source, Stage
from pipeline.run.stages import MODEL, Inputs, Spec, conversion
from pipeline.run.texts import Questions, load_tokens
from stages import evaluation
from stages.analysis.rates import by_role
from stages.analysis.real_valued import real_valued
from stages.codings.base import Coding
from stages.energy import by_part, of_model, spent
from stages.model.loading import meta_model
from stages.model.perturbation import Perturbation
from stages.model.shares import Parts
from stages.text import corpus
from stages.text.answers import Answers, Portion, portions
from stages.text.harness import TaskSpec

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from pipeline.run.settings import Settings

log = logging.getLogger(__name__)


class Perplexity(Cut):
    """Perplexity on a corpus, with the counters of every site."""

    name = "evaluation"
    code = ("stages.evaluation", *MODEL)

    @classmethod
    def of(cls, spec: Spec, name: str, made_from: Mapping[str, Source], part: str) -> Self:
        return cls({"perplexity": name, **spec}, made_from, part)

    @staticmethod
    def make(out: Path, spec: Spec, inputs: Inputs, runtime: Any) -> None:
        ids = windows(spec, inputs, spec["perplexity"])
        model, _ = inputs["model"].load()
        if runtime.execution == "stepped":
            log.info("stepped; on real values: %s", ", ".join(real_valued(model)))
        how = measuring(spec, inputs, runtime)
        result = evaluation.perplexity(model, ids, batch=runtime.evaluation_batch, **how)
        result.metrics["all"] = spec["count"] == corpus.ALL
        result.save(out)

    @staticmethod
    def units(spec: Spec, inputs: Inputs, runtime: Any) -> int:
        return batches(len(windows(spec, inputs, spec["perplexity"])), runtime.evaluation_batch)

    @staticmethod
    def share(claims: Iterable[Claimed], spec: Spec, inputs: Inputs, runtime: Any) -> None:
        ids = windows(spec, inputs, spec["perplexity"])
        model, _ = inputs["model"].load()
        shares = passing(ids, runtime.evaluation_batch, claims)
        evaluation.Likelihoods(**measuring(spec, inputs, runtime)).run_shares(model, shares)

    @staticmethod
    def merge(out: Path, parts: Sequence[Path], spec: Spec, inputs: Inputs, runtime: Any) -> None:
        ids = windows(spec, inputs, spec["perplexity"])
        model, _ = inputs["model"].load()
        measured = evaluation.Likelihoods(**measuring(spec, inputs, runtime))
        result = measured.merged(model, ids, Parts(parts))
        result.metrics["all"] = spec["count"] == corpus.ALL
        result.save(out)


def windows(spec: Spec, inputs: Inputs, name: str) -> Tensor:
    """The ids [windows, length] of a corpus that are evaluated."""
    ids = load_tokens(inputs["tokens"])
    return corpus.windows(ids, spec["count"], spec["length"], 0, name, spec["begin"])


def measuring(spec: Spec, inputs: Inputs, runtime: Any) -> dict[str, Any]:
    """How perplexity is measured; only the counters of the first replicate are read."""
    return {
        "conversion": conversion(spec, inputs),
        "corpus": spec["perplexity"],
        "execution": runtime.execution,
        "perturbation": spec["perturbation"],
        "counted": spec["perturbation"] is None,
    }


class Anytime(Cut):
    """Perplexity on a corpus after each step of the neurons."""

    name = "evaluation"
    code = ("stages.evaluation", *MODEL)

    @classmethod
    def of(cls, s: Settings, name: str, made_from: Mapping[str, Source]) -> Self:
        return cls({"anytime": name, **read(s, s.coding)}, made_from, "anytime")

    @staticmethod
    def make(out: Path, spec: Spec, inputs: Inputs, runtime: Any) -> None:
        name = spec["anytime"]
        ids = windows(spec, inputs, name)
        model, _ = inputs["model"].load()
        neurons = conversion(spec, inputs)
        assert neurons is not None
        by_step = evaluation.anytime(model, ids, neurons, runtime.evaluation_batch, name)
        by_step.to_parquet(out / ANYTIME)

    @staticmethod
    def units(spec: Spec, inputs: Inputs, runtime: Any) -> int:
        neurons = conversion(spec, inputs)
        assert neurons is not None
        return evaluation.longest(neurons)

    @staticmethod
    def share(claims: Iterable[Claimed], spec: Spec, inputs: Inputs, runtime: Any) -> None:
        name, neurons = spec["anytime"], conversion(spec, inputs)
        assert neurons is not None
        how = (windows(spec, inputs, name), neurons, runtime.evaluation_batch, name)
        model, _ = inputs["model"].load()
        for claimed in claims:
            rows = evaluation.after_steps(claimed.number + 1, model, *how)
            claimed.leave(partial(_write, rows))

    @staticmethod
    def merge(out: Path, parts: Sequence[Path], spec: Spec, inputs: Inputs, runtime: Any) -> None:
        import pandas as pd

        frames = [pd.read_parquet(folder / ANYTIME) for folder in parts]
        pd.concat(frames, ignore_index=True).to_parquet(out / ANYTIME)


def _write(rows: pd.DataFrame, folder: Path) -> None:
    rows.to_parquet(folder / ANYTIME)


def read(s: Settings, coding: Coding, perturbation: Perturbation | None = None) -> dict[str, Any]:
    """The coding, the windows of a corpus, and how a replicate differs from the first."""
    spec = {"coding": coding, "perturbation": perturbation, "begin": s.model.begin}
    return spec | {"count": s.evaluation.windows, "length": s.evaluation.length}


def asked(s: Settings, coding: Coding, perturbation: Perturbation | None = None) -> dict[str, Any]:
    """The same for the questions of a task."""
    return {"coding": coding, "perturbation": perturbation, "items": s.evaluation.items}


class Accuracy(Cut):
    """Zero-shot accuracy on a task."""

    name = "evaluation"
    code = ("stages.evaluation", *MODEL)

    @classmethod
    def of(cls, spec: Spec, task: TaskSpec, made_from: Mapping[str, Source], part: str) -> Self:
        prompts = {"task": replace(task, path=None), "lm_eval": version("lm_eval")}
        return cls({**spec, **prompts}, {**made_from, "data": Questions(task)}, part)

    @staticmethod
    def make(out: Path, spec: Spec, inputs: Inputs, runtime: Any) -> None:
        task = spec["task"]
        questions = [(task, inputs["data"])]
        model, tokenizer = inputs["model"].load()
        neurons, batch = conversion(spec, inputs), runtime.task_batch
        how = (spec["items"], batch, runtime.execution, spec["perturbation"])
        evaluation.accuracy(model, tokenizer, neurons, questions, *how)[task.name].save(out)

    @staticmethod
    def units(spec: Spec, inputs: Inputs, runtime: Any) -> int:
        return portions(spec["items"])

    @staticmethod
    def share(claims: Iterable[Claimed], spec: Spec, inputs: Inputs, runtime: Any) -> None:
        task = (spec["task"], inputs["data"])
        model, tokenizer = inputs["model"].load()
        neurons, batch = conversion(spec, inputs), runtime.task_batch
        how = (spec["items"], batch, runtime.execution, spec["perturbation"])
        with evaluation.questioned(model, tokenizer, neurons, task, *how) as ask:
            for claimed in claims:
                claimed.leave(ask(claimed.number).save)

    @staticmethod
    def merge(out: Path, parts: Sequence[Path], spec: Spec, inputs: Inputs, runtime: Any) -> None:
        task = spec["task"]
        answers = Answers.joined(map(Portion.load, parts), task.metric, task.split)
        evaluation.noted(answers, spec["perturbation"]).save(out)


class Energy(Stage):
    """Cost of every operation, and sums by convention and phase, on a corpus' counters; NeuroBench's
    metrics on the same."""

    name = "energy"
    code = ("stages.energy", "stages.analysis.neurobench")  # and all that they import

    @classmethod
    def of(cls, s: Settings, model: ModelSource, perplexity: Perplexity) -> Self:
        energy = replace(s.energy, tokens=s.energy.tokens or s.evaluation.length)
        dims = {name: shipped.dims(name) for name in s.energy.models}
        spec = {"energy": energy, "coding": s.coding, "dims": dims}
        if dims:
            spec["transform"] = s.transform
        fitted = {name: perplexity.inputs[name] for name in perplexity.inputs if name == "fitting"}
        return cls(spec, {"model": model, "evaluation": perplexity, **fitted})

    @staticmethod
    def make(out: Path, spec: Spec, inputs: Inputs, runtime: Any) -> None:
        import pandas as pd

        energy, coding = spec["energy"], spec["coding"]
        model, _ = inputs["model"].load()
        measured = evaluation.Perplexity.load(inputs["evaluation"].path)
        counters = measured.counters if coding.converts else None
        frame, totals = of_model(model, energy, counters, coding)
        frame.to_parquet(out / "operations.parquet")
        parts = {"": by_part(spent(frame, energy))}
        totals["models"], roles = {}, None
        if spec["dims"] and counters is not None:
            roles = by_role(counters, "energy.models")
        for name, dims in spec["dims"].items():
            described = meta_model(dims)
            spec["transform"].declare(described)
            frame, totals["models"][name] = of_model(described, energy, roles, coding)
            parts[name] = by_part(spent(frame, energy))
        pd.concat(parts, names=["model"]).reset_index(level=0).to_parquet(out / "parts.parquet")
        (out / "summary.json").write_text(json.dumps(totals, indent=1))
        neurobench.write(out, model, measured, conversion(spec, inputs))
