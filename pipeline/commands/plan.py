"""`python -m pipeline plan`: what a command would do, before hours are spent on it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tabulate import tabulate

from pipeline.run import checks
from pipeline.run.chain import Chain, chain
from pipeline.run.jobs import jobs
from pipeline.run.models import unidentified
from pipeline.run.settings import Settings
from pipeline.run.stage import Stage
from pipeline.store.objects import Away
from pipeline.store.step import Step, plain
from pipeline.store.store import Store
from stages.errors import InputError
from stages.text.corpus import ALL

log = logging.getLogger(__name__)
# What a build's time grows with, where its fields say so: tokens or questions.
SIZES = (("count", "length"), ("windows", "length"), ("items",))
OF_THE_MODEL = 2  # of the kinds of a build, those of one model, which come first


@dataclass
class Planned:
    """One job: how many of its artifacts are there, how many an earlier job of the plan builds, and
    which it would build itself, with their seconds where past builds or the model's dimensions say."""

    name: str
    stored: int = 0
    shared: int = 0
    builds: dict[str, float | None] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)  # of each of the builds
    predicted: list[str] = field(default_factory=list)  # builds of which the dimensions say it
    borrowed: list[str] = field(default_factory=list)  # builds estimated from those of other models


def show(overrides: Sequence[str]) -> None:
    """Prints the jobs of a command line, what each would build and about how long that takes; of one job
    also what its stages take by the dimensions of the model."""
    from pipeline.commands.stage_table import Forecasts  # takes seconds to import what it needs

    said: set[str] = set()
    chains = [_checked(job.settings, said) for job in jobs(overrides)]
    past, forecasts = Past(), Forecasts()
    rows = plan(chains, past, forecasts.seconds)
    detail = forecasts.table(chains[0], past.seconds) if len(chains) == 1 else None
    table = [
        (
            number,
            row.name,
            row.stored,
            row.shared,
            _short(row.stages),
            _span(row.builds.values()),
        )
        for number, row in enumerate(rows)
    ]
    print(tabulate(table, ("job", "run", "stored", "shared", "builds", "about"), "simple"))
    builds = [(label, s) for row in rows for label, s in row.builds.items()]
    print(
        f"\n{_many(len(rows), 'job')}, {_many(len(builds), 'artifact')} to build: about "
        f"{_span(seconds for _, seconds in builds)} one after the other, as past builds took"
    )
    notes = {
        f"by the dimensions of the model and the rates {forecasts.rates}": [
            r.predicted for r in rows
        ],
        "estimated from builds of other models": [row.borrowed for row in rows],
        "no past build to estimate from": [
            [label for label, seconds in row.builds.items() if seconds is None] for row in rows
        ],
    }
    for note, labels in notes.items():
        if names := sorted({label for each in labels for label in each}):
            print(f"{note}: {', '.join(names)}")
    if detail is not None:
        print(f"\n{detail}")


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _short(names: Iterable[str]) -> str:
    """Stages by name, each with how many artifacts of it there are if there are several."""
    stages = Counter(names)
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in stages.items())


def _checked(settings: Settings, said: set[str]) -> Chain:
    """The steps of a job, which is refused where that needs no more than a look."""
    if settings.table.columns is not None:
        from pipeline.tables.tables import check_columns  # with all that makes tables

        read = settings.evaluation
        check_columns(settings.table.columns, read.corpora, read.tasks, [*settings.energy.profiles])
    settings.check_places()
    steps = _steps(settings, settings.store.open(), said)
    if steps.export is not None:
        settings.export.check_free(steps.export.key())
    checks.planned(steps)
    return steps


def _steps(settings: Settings, store: Store, said: set[str]) -> Chain:
    """The steps; of a model with dimensions also where the hub does not say its commit, which is `said`
    once a plan."""
    try:
        return chain(settings, store)
    except InputError as error:
        spec = settings.model
        if spec.hub is None or not spec.dims:
            raise
        steps = chain(settings, store, known=unidentified(spec, store))
        if str(error) not in said:
            said.add(str(error))
            log.info("%s", error)
            log.info("planned by the dimensions of conf/model, as if nothing of it were stored")
        return steps


def plan(
    chains: Iterable[Chain],
    past: Past | None = None,
    predicted: Callable[[Chain, Collection[str]], Mapping[str, float]] | None = None,
) -> list[Planned]:
    """Every job's artifacts, in the order of the jobs; nothing is built or loaded.

    `predicted` gives the seconds of the stages that a job builds by label, which are taken where no past
    build is of its model.
    """
    coming: set[str] = set()
    past = past or Past()
    rows = []
    for steps in chains:
        store = steps.model.store
        model = steps.settings.model.name
        rows.append(row := Planned(f"{steps.settings.name} on {model}"))
        missing = {}
        for label, step in (steps.sources | steps.steps).items():
            key = step.key()
            if store.holds(step.name, key):
                row.stored += 1
            elif key in coming:
                row.shared += 1
            else:
                coming.add(key)
                missing[label] = step
        forecast: Mapping[str, float] | None = None
        for label, step in missing.items():
            row.stages.append(step.name)
            seconds, same_model = past.of(store).estimate(step.step, steps.model.key())
            if predicted and (seconds is None or not same_model):
                forecast = predicted(steps, missing) if forecast is None else forecast
                if label in forecast:
                    seconds, same_model = forecast[label], True
                    row.predicted.append(label)
            row.builds[label] = seconds
            if not same_model:
                row.borrowed.append(label)
    return rows


class Past:
    """The builds of stores, of which every manifest is read once, when it is asked for."""

    def __init__(self) -> None:
        self._known: dict[str, History] = {}

    def of(self, store: Store) -> History:
        if store.name not in self._known:
            self._known[store.name] = History(store)
        return self._known[store.name]

    def seconds(self, steps: Chain, stage: Stage) -> float | None:
        """What the build of a job's stage took, or those of its kind of the same model; None: no such."""
        store, step = steps.model.store, stage.step
        try:
            place = store.root / step.stage / step.key()
            if record := store.records([place])[place]:
                return float(record["seconds"])
        except (Away, KeyError):
            pass
        seconds, same_model = self.of(store).estimate(step, steps.model.key())
        return seconds if same_model else None


class History:
    """Seconds that the builds of a store took, per token or question where that is what counts."""

    def __init__(self, store: Store):
        self.rates: dict[tuple[Any, ...], list[float]] = {}
        try:
            records = store.records(store.folders())
        except Away as fault:
            log.warning("no past builds to estimate from: %s", fault)
            records = {}
        made = {place.name: record for place, record in records.items() if record is not None}
        for key, record in made.items():
            rate = record["seconds"] / _size(record["spec"])
            for kind in _kinds(record["stage"], record["spec"], _model(key, made)):
                self.rates.setdefault(kind, []).append(rate)

    def estimate(self, step: Step, model: str | None = None) -> tuple[float | None, bool]:
        """The median of the builds most like this one, None if there is none of its stage; and whether
        they were of the same model, whose key is `model` or among the inputs."""
        spec: Any = plain(step.spec)
        kinds = _kinds(step.stage, spec, model or step.inputs.get("model"))
        for place, kind in enumerate(kinds):
            if rates := self.rates.get(kind):
                return median(rates) * _size(spec), place < OF_THE_MODEL
        return None, True


def _model(key: str, made: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The key of the model from which an artifact was made, through those that it was made from; None
    where they are gone."""
    record = made.get(key)
    if record is None or record["stage"] == "model":
        return key if record is not None else None
    inputs = record["inputs"]
    if "model" in inputs:
        return str(inputs["model"])
    models = (_model(each, made) for each in inputs.values())
    return next((model for model in models if model is not None), None)


def _kinds(stage: str, spec: Any, model: str | None) -> list[tuple[Any, ...]]:
    """What builds of about one speed have in common, the closest kin first."""
    coding = (spec.get("coding") or {}).get("class")
    task = spec.get("task") or {}
    kind = (stage, "task" in spec, spec.get("count") == ALL)
    part = (*kind, spec.get("perplexity") or task.get("name"))
    return [(*part, coding, model), (*part, None, model), (*part, coding), kind]


def _size(spec: Any) -> float:
    for names in SIZES:
        if all(isinstance(spec.get(name), int) for name in names):
            product = 1
            for name in names:
                product *= spec[name]
            return product
    return 1


def _span(seconds: Iterable[float | None]) -> str:
    """A time for people: 40 s, 12 min, 3.5 h; unknown parts are left out."""
    total = sum(s for s in seconds if s is not None)
    if total < 90:
        return f"{total:.0f} s"
    return f"{total / 60:.0f} min" if total < 5400 else f"{total / 3600:.1f} h"
