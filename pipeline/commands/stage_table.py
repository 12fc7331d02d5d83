"""The table of what the stages of a job take, beside what they took."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import psutil
from tabulate import tabulate

from pipeline.commands.prediction import START, Cost, Prediction, Shape, SharedOut
from pipeline.run.chain import Chain
from pipeline.run.rates import Rates, of_worker
from pipeline.run.settings import Settings
from pipeline.run.stage import Stage


class Forecasts:
    """What the stages of jobs will take; each job is predicted once, and a model built once."""

    def __init__(self) -> None:
        self.rates = ""  # whose rates, once there is a forecast
        self._shapes: dict[str, Shape] = {}
        self._made: dict[int, tuple[Rates, dict[str, Cost | None]]] = {}

    def seconds(self, chain: Chain) -> dict[str, float]:
        """The seconds of a job's stages by label, of those whose size is known."""
        _, costs = self._of(chain)
        return {label: cost.seconds for label, cost in costs.items() if cost is not None}

    def table(self, chain: Chain, past: Callable[[Chain, Stage], float | None]) -> str:
        """The table of the stages of a job, those that are stored among them, and what its numbers rest
        on. `past` gives the seconds that a build took or is known to take."""
        rates, costs = self._of(chain)
        took = {label: past(chain, stage) for label, stage in chain.steps.items()}
        rows = [_row(label, cost, took.get(label)) for label, cost in costs.items()]
        known = [cost for cost in costs.values() if cost is not None]
        total = _number(sum(c.seconds for c in known)), "", _giga(max(c.held for c in known))
        sums = _giga(sum(c.read for c in known)), _giga(sum(c.sent for c in known)), ""
        heads = ("stage", "seconds", "measured", "GB held", "GB read", "GB sent", "bound by")
        align = ("left", *["right"] * 5, "left")
        table = tabulate(
            [*rows, ("all", *total, *sums)], heads, "simple", disable_numparse=True, colalign=align
        )
        return "\n".join(
            [*_basis(chain.settings, rates), "", table, *_notes(chain, costs, rates.kind)]
        )

    def _of(self, chain: Chain) -> tuple[Rates, dict[str, Cost | None]]:
        """The rates of a worker, and the costs of its start and of every stage."""
        if id(chain) not in self._made:
            s = chain.settings
            config = s.model.config()
            rates = of_worker(s, config)
            if (name := str(config)) not in self._shapes:
                self._shapes[name] = Shape(config)
            prediction = Prediction(s, rates, self._shapes[name])
            costs: dict[str, Cost | None] = {START: prediction.start()}
            costs |= {label: prediction.of(stage) for label, stage in chain.steps.items()}
            self._made[id(chain)] = rates, costs
            self.rates = rates.source
        return self._made[id(chain)]


def _row(label: str, cost: Cost | None, took: float | None) -> tuple[str, ...]:
    measured = "" if took is None else _number(took)
    if cost is None:
        return label, "–", measured, "–", "–", "–", ""
    sizes = (_giga(each) for each in (cost.held, cost.read, cost.sent))
    return label, _number(cost.seconds), measured, *sizes, cost.bound


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


def _notes(chain: Chain, costs: Mapping[str, Cost | None], kind: str) -> list[str]:
    """What a table does not say: who is idle, what does not fit, what is not in it."""
    s = chain.settings
    notes, workers = [], s.runtime.workers
    batches = SharedOut.of(s.calibration.windows, s.runtime.batch, workers).units
    if chain.capture is not None and batches < workers:
        notes.append(
            f"capture has {batches} batches of {s.runtime.batch} windows for {workers} workers: give "
            "a smaller runtime.batch"
        )
    held = max(cost.held for cost in costs.values() if cost is not None)
    together = held * (workers if s.runtime.engine == "local" else 1)
    there = psutil.virtual_memory().total
    here = kind == "cpu" and s.runtime.engine == "local"
    if here and together > there and s.runtime.offload is None:
        notes.append(
            f"{together / 1e9:.0f} GB are held at once, this machine has {there / 1e9:.0f}: "
            "runtime=offload holds two layers, runtime.engine=slurm has other machines"
        )
    unknown = [label for label, cost in costs.items() if cost is None]
    if unknown:
        notes.append(f"as large as their text, which is not read: {', '.join(unknown)}")
    if s.transform.name != "none":
        notes.append(f"what transform={s.transform.name} adds to a pass is not in it")
    return ["", *notes] if notes else []


def _number(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"


def _giga(size: float) -> str:
    return f"{size / 1e9:.3g}" if size else "–"
