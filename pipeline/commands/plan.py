"""`python -m pipeline plan`: what a command would do, before hours are spent on it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tabulate import tabulate

from pipeline.run import checks
from pipeline.run.chain import Chain, chain
from pipeline.run.jobs import jobs
from pipeline.run.models import unidentified
from pipeline.run.settings import Settings
from pipeline.store.objects import Away
from pipeline.store.step import Step, plain
from pipeline.store.store import Store
from stages.errors import InputError
from stages.text.corpus import ALL

log = logging.getLogger(__name__)
# What a build's time grows with, where its fields say so: tokens or questions.
SIZES = (("count", "length"), ("windows", "length"), ("items",))


@dataclass
class Planned:
    """One job: how many of its artifacts are there, how many an earlier job of the plan builds, and
    which it would build itself, with their seconds where past builds say."""

    name: str
    stored: int = 0
    shared: int = 0
    builds: dict[str, float | None] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)  # of each of the builds
    borrowed: list[str] = field(default_factory=list)  # builds estimated from those of other models


def show(overrides: Sequence[str]) -> None:
    """Prints the jobs of a command line, what each would build and about how long that takes; of one job
    also what its stages take by the dimensions of the model."""
    chains = [_checked(job.settings) for job in jobs(overrides)]
    past = Past()
    rows = plan(chains, past)
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
    unknown = sorted({label for label, seconds in builds if seconds is None})
    print(
        f"\n{len(rows)} jobs, {len(builds)} artifacts to build: about "
        f"{_span(seconds for _, seconds in builds)} one after the other, as past builds took"
    )
    if unknown:
        print(f"no past build to estimate from: {', '.join(unknown)}")
    if borrowed := sorted({label for row in rows for label in row.borrowed}):
        print(f"estimated from builds of other models: {', '.join(borrowed)}")
    if len(chains) == 1:
        from pipeline.commands.stage_table import predict  # takes seconds to import what it needs

        print(f"\n{predict(chains[0], past.seconds)}")


def _short(names: Iterable[str]) -> str:
    """Stages by name, each with how many artifacts of it there are if there are several."""
    stages = Counter(names)
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in stages.items())


def _checked(settings: Settings) -> Chain:
    """The steps of a job, which is refused where that needs no more than a look."""
    if settings.table.columns is not None:
        from pipeline.tables.tables import check_columns  # with all that makes tables

        read = settings.evaluation
        check_columns(settings.table.columns, read.corpora, read.tasks, [*settings.energy.profiles])
    settings.check_places()
    steps = _steps(settings, settings.store.open())
    if steps.export is not None:
        settings.export.check_free(steps.export.key())
    checks.planned(steps)
    return steps


def _steps(settings: Settings, store: Store) -> Chain:
    """The steps; of a model with dimensions also where the hub does not say its commit."""
    try:
        return chain(settings, store)
    except InputError as error:
        spec = settings.model
        if spec.hub is None or not spec.dims:
            raise
        steps = chain(settings, store, known=unidentified(spec, store))
        log.info("%s", error)
        log.info("planned by the dimensions of conf/model, as if nothing of it were stored")
        return steps


def plan(chains: Iterable[Chain], past: Past | None = None) -> list[Planned]:
    """Every job's artifacts, in the order of the jobs; nothing is built or loaded."""
    coming: set[str] = set()
    past = past or Past()
    rows = []
    for steps in chains:
        store = steps.model.store
        model = steps.settings.model.name
        rows.append(row := Planned(f"{steps.settings.name} on {model}"))
        for label, step in (steps.sources | steps.steps).items():
            key = step.key()
            if store.holds(step.name, key):
                row.stored += 1
            elif key in coming:
                row.shared += 1
            else:
                coming.add(key)
                row.builds[label], same_model = past.of(store).estimate(step.step)
                row.stages.append(step.name)
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

    def seconds(self, step: Step, store: Store) -> float | None:
        """What the build of an artifact took, or those of its kind of the same model; None: no such."""
        try:
            place = store.root / step.stage / step.key()
            if record := store.records([place])[place]:
                return float(record["seconds"])
        except (Away, KeyError):
            pass
        seconds, same_model = self.of(store).estimate(step)
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
        for record in records.values():
            if record is None:
                continue
            rate = record["seconds"] / _size(record["spec"])
            for kind in _kinds(record["stage"], record["spec"], record["inputs"]):
                self.rates.setdefault(kind, []).append(rate)

    def estimate(self, step: Step) -> tuple[float | None, bool]:
        """The median of the builds most like this one, None if there is none of its stage; and whether
        they were of the same model."""
        spec: Any = plain(step.spec)
        kinds = _kinds(step.stage, spec, step.inputs)
        for place, kind in enumerate(kinds):
            if rates := self.rates.get(kind):
                same = place < 2 or step.inputs.get("model") is None
                return median(rates) * _size(spec), same
        return None, True


def _kinds(stage: str, spec: Any, inputs: Mapping[str, str]) -> list[tuple[Any, ...]]:
    """What builds of about one speed have in common, the closest kin first."""
    coding = (spec.get("coding") or {}).get("class")
    task = spec.get("task") or {}
    kind = (stage, "task" in spec, spec.get("count") == ALL)
    part = (*kind, spec.get("perplexity") or task.get("name"))
    model = inputs.get("model")
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
