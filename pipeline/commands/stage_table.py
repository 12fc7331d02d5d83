"""The table of what the stages of a job take, beside what they took."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import pairwise

import psutil
from tabulate import tabulate

from pipeline.commands.prediction import FINISH, START, Prediction, Shape
from pipeline.commands.schedule import Done, Load, schedule
from pipeline.run.chain import Chain
from pipeline.run.rates import Rates, of_worker
from pipeline.run.settings import Settings
from pipeline.run.shares import batches
from pipeline.run.stage import Stage, sources

MOVED = ("held", "read", "sent")
# "of all" has the seconds of all workers; "until" when the stage is there, after the start of the command.
HEADS = ("stage", "seconds", "of all", "measured", "until", *(f"GB {w}" for w in MOVED), "bound by")


class Forecasts:
    """What the stages of jobs will take; each job is predicted once, and a model built once."""

    def __init__(self) -> None:
        self.rates = ""  # whose rates, once there is a forecast
        self._shapes: dict[str, Shape] = {}
        self._made: dict[int, tuple[Rates, Prediction, dict[str, Load | None]]] = {}

    def seconds(self, chain: Chain, missing: Collection[str]) -> dict[str, float]:
        """By how many seconds each of the stages that a job lacks puts off its end, by label; of those
        whose size is known."""
        _, prediction, loads = self._of(chain)
        lacking = {label: load for label, load in loads.items() if label in missing}
        stages = _scheduled(chain, prediction, lacking)
        known = ((label, stages[label]) for label in (START, *lacking))
        ends = sorted((done.end, label) for label, done in known if done is not None)
        return {label: end - before for (before, _), (end, label) in pairwise(ends)}

    def table(self, chain: Chain, past: Callable[[Chain, Stage], float | None]) -> str:
        """The table of the stages of a job, those that are stored among them, and what its numbers rest
        on. `past` gives the seconds that a build took or is known to take."""
        rates, prediction, loads = self._of(chain)
        stages = _scheduled(chain, prediction, loads)
        took = {label: past(chain, stage) for label, stage in chain.steps.items()}
        rows = [_row(label, done, took.get(label)) for label, done in stages.items()]
        known = [done for done in stages.values() if done is not None]
        seconds = _number(max(d.end for d in known)), _number(sum(d.all.seconds for d in known))
        held = max(d.most.held for d in known)
        moved = sum(d.most.read for d in known), sum(d.all.sent for d in known)
        total = ("all", *seconds, "", "", *map(_giga, (held, *moved)), "")
        table = [HEADS, *rows, total]
        if chain.settings.runtime.workers == 1:
            table = [(*row[:2], *row[3:]) for row in table]
        align = ("left", *["right"] * (len(table[0]) - 2), "left")
        lines = tabulate(table, "firstrow", "simple", disable_numparse=True, colalign=align)
        notes = _notes(chain, stages, rates.kind)
        return "\n".join([*_basis(chain.settings, rates), "", lines, *notes])

    def _of(self, chain: Chain) -> tuple[Rates, Prediction, dict[str, Load | None]]:
        """The rates of a worker, and what every stage costs by them."""
        if id(chain) not in self._made:
            s = chain.settings
            config = s.model.config()
            rates = of_worker(s, config)
            if (name := str(config)) not in self._shapes:
                self._shapes[name] = Shape(config)
            prediction = Prediction(s, rates, self._shapes[name])
            loads = {label: prediction.of(stage) for label, stage in chain.steps.items()}
            self._made[id(chain)] = rates, prediction, loads
            self.rates = rates.source
        return self._made[id(chain)]


def _scheduled(
    chain: Chain, prediction: Prediction, costs: Mapping[str, Load | None]
) -> dict[str, Done | None]:
    """Some stages by label in their order, between start and end of the command; None where the size of
    one is unknown. What the others would make is there."""
    steps = chain.steps
    loads = {label: load for label, load in costs.items() if load is not None}
    after = {label: {each.label for each in sources(steps[label])} & {*loads} for label in loads}
    workers, start, finish = chain.settings.runtime.workers, prediction.start(), prediction.finish()
    done = schedule(loads, after, workers, start.seconds)
    begun = Done(dict.fromkeys(range(workers), start), start.seconds)
    end = max((each.end for each in done.values()), default=start.seconds)
    ended = Done({0: finish}, end + finish.seconds)
    return {START: begun} | {label: done.get(label) for label in costs} | {FINISH: ended}


def _row(label: str, done: Done | None, took: float | None) -> tuple[str, ...]:
    measured = "" if took is None else _number(took)
    if done is None:
        return label, "–", "–", measured, *"––––", ""
    most, every = done.most, done.all
    sizes = (_giga(each) for each in (most.held, most.read, every.sent))
    seconds = _number(most.seconds), _number(every.seconds)
    return label, *seconds, measured, _number(done.end), *sizes, most.bound


def _basis(s: Settings, rates: Rates) -> list[str]:
    """What the table is of: the model, its workers, their rates and where those come from."""
    number, here = s.runtime.workers, s.runtime.engine == "local"
    each = "one worker"
    if number > 1:
        each = f"{number} workers, {'together on this machine' if here else 'each on a machine'}"
    offloaded = "" if s.runtime.offload is None else ", layers from disk"
    return [
        f"{s.model.name} in {s.model.dtype} on {each}{offloaded}; a worker has",
        f"{rates.flops / 1e9:.0f} GFLOP/s of products, memory of {rates.memory / 1e9:.1f} GB/s, a disk of "
        f"{rates.disk / 1e9:.2f}, a network of {rates.network / 1e9:.3f} ({rates.kind})",
        f"rates: {rates.source}; bytes and seconds are those of the worker with most to do",
    ]


def _notes(chain: Chain, stages: Mapping[str, Done | None], kind: str) -> list[str]:
    """What a table does not say: who is idle, what does not fit, what is not in it."""
    s = chain.settings
    notes, workers = [], s.runtime.workers
    units = batches(s.calibration.windows, s.runtime.batch)
    if chain.capture is not None and units < workers:
        notes.append(
            f"capture has {units} batches of {s.runtime.batch} windows for {workers} workers: give "
            "a smaller runtime.batch"
        )
    held = max(done.most.held for done in stages.values() if done is not None)
    together = held * (workers if s.runtime.engine == "local" else 1)
    there = psutil.virtual_memory().total
    here = kind == "cpu" and s.runtime.engine == "local"
    if here and together > there and s.runtime.offload is None:
        notes.append(
            f"{together / 1e9:.0f} GB are held at once, this machine has {there / 1e9:.0f}: "
            "runtime=offload holds two layers, runtime.engine=slurm has other machines"
        )
    unknown = [label for label, done in stages.items() if done is None]
    if unknown:
        notes.append(f"as large as their text, which is not read: {', '.join(unknown)}")
    if s.transform.name != "none":
        notes.append(f"what transform={s.transform.name} adds to a pass is not in it")
    return ["", *notes] if notes else []


def _number(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"


def _giga(size: float) -> str:
    return f"{size / 1e9:.3g}" if size else "–"
