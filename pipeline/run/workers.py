"""A conversion on several workers: started, watched, started again; one bar tells of all of them."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.run import engines
from pipeline.run.errors import REFUSED, one_line
from pipeline.run.settings import Settings
from pipeline.run.shares import Cut, Shared
from pipeline.run.stage import Running, Stage, sources
from pipeline.store.store import Store
from stages.compiler import compiled
from stages.errors import InputError

log = logging.getLogger(__name__)
POLL_SECONDS = 0.3
GRACE_SECONDS = 10.0  # for workers to see that all is done


@dataclass(frozen=True)
class Order:
    """The work of one worker: its number and how many workers there are, the settings, the folder to run
    in, its threads, and the keys of all stages, which are those that the driver has."""

    worker: tuple[int, int]
    settings: Settings
    command: str
    folder: Path
    threads: int
    keys: frozenset[str]


@dataclass(frozen=True)
class Outcome:
    """How a worker has ended: `refused` is a line for the user, `failed` the traceback of a bug."""

    refused: str | None = None
    failed: str | None = None
    compiled: bool = True


def carried_out(order: Order, work: Callable[[Order], None]) -> Outcome:
    """Do the work of an order in this process, and say how it has ended."""
    os.chdir(order.folder)
    number, count = order.worker
    form = f"[%(asctime)s][%(levelname)s] worker {number + 1} of {count}: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, datefmt="%H:%M:%S")
    torch.set_num_threads(order.threads)
    try:
        work(order)
    except REFUSED as error:
        return Outcome(refused=one_line(error))
    except Exception:
        return Outcome(failed=traceback.format_exc())
    return Outcome(compiled=compiled())


def check_keys(order: Order, stages: Sequence[Stage]) -> None:
    """Raises InputError where a worker would build something else than it is asked for."""
    if other := [stage.label for stage in stages if stage.key() not in order.keys]:
        number, _ = order.worker
        raise InputError(
            f"worker {number + 1} has another key of {other[0]}: its code, its versions of torch or "
            "transformers, or a branch of the hub are not those of the process that has started it; let "
            "all machines share one folder and one environment"
        )


def share_out(
    stages: Sequence[Stage],
    store: Store,
    settings: Settings,
    runtime: Running,
    command: str,
    work: Callable[[Order], None],
    stood: Callable[[Stage], object],
) -> bool:
    """Have workers build what is missing of `stages`; whether all their kernels were compiled.

    `work` is what each of them does, see `pipeline.run.peers`; `stood` is called with every stage that
    was missing once it is there. Raises InputError where a worker is refused something, or dies again and
    again.
    """
    missing = [stage for stage in stages if store.find(stage.step) is None]
    if not missing:
        return True
    spec = settings.runtime
    engine = engines.engine(spec, (store.root / ".workers").absolute())
    place = "cache" if settings.store.remote else "path"
    there = replace(settings.store, **{place: str(store.root.absolute())})
    where = replace(settings, store=there)
    keys = frozenset(stage.key() for stage in stages)
    orders = [
        Order((number, spec.workers), where, command, Path.cwd(), engine.threads, keys)
        for number in range(spec.workers)
    ]
    starts = [partial(carried_out, order, work) for order in orders]
    log.info("%d workers (%s), %d threads each", spec.workers, spec.engine, engine.threads)
    bar = Bar(missing, store, runtime, stood)
    try:
        with _started(engine, starts) as workers, bar:
            fast = _watched(engine, starts, workers, bar)
    finally:
        engine.close()
    bar.tidy()
    return fast


@contextmanager
def _started(
    engine: engines.Engine, starts: Sequence[engines.Function]
) -> Iterator[dict[int, engines.Worker]]:
    """The workers by their numbers; those that are left are stopped."""
    workers: dict[int, engines.Worker] = {}
    try:
        for number, start in enumerate(starts):
            workers[number] = engine.start(start)
        yield workers
    finally:
        for worker in workers.values():
            worker.stop()


def _watched(
    engine: engines.Engine,
    starts: Sequence[engines.Function],
    workers: dict[int, engines.Worker],
    bar: Bar,
) -> bool:
    """Wait for all workers, with another one in the place of each that dies."""
    fast, deaths, until = True, 0, float("inf")
    while workers and time.monotonic() < until:
        for number, worker in list(workers.items()):
            if not worker.done():
                continue
            try:
                outcome: Outcome = worker.result()
            except Exception as error:
                deaths += 1
                why = (str(error).strip().splitlines() or [type(error).__name__])[0]
                if deaths > engines.RETRIES * len(starts):
                    raise InputError(
                        f"workers have died {deaths} times, the last of them: {why}; where memory is "
                        "short, give fewer runtime.workers or smaller runtime.batch"
                    ) from error
                log.warning("worker %d has died (%s); another takes its place", number + 1, why)
                workers[number] = engine.start(starts[number])
                continue
            del workers[number]
            if outcome.refused is not None:
                raise InputError(outcome.refused)
            if outcome.failed is not None:
                failure = RuntimeError(f"worker {number + 1}: {outcome.failed.splitlines()[-1]}")
                failure.add_note(outcome.failed)  # which log files have
                raise failure
            fast &= outcome.compiled
        if bar.update() and until == float("inf"):
            until = time.monotonic() + GRACE_SECONDS  # one that waits in a queue may never start
        time.sleep(POLL_SECONDS)
    bar.update()
    return fast


class Bar:
    """The progress of all workers: units of the stages that were missing, as the store holds them."""

    def __init__(
        self,
        missing: Sequence[Stage],
        store: Store,
        runtime: Running,
        stood: Callable[[Stage], object],
    ) -> None:
        self._missing = {stage.key(): stage for stage in missing}
        self._store, self._runtime, self._stood = store, runtime, stood
        self._units: dict[str, list[Shared]] = {}  # of stages whose inputs are there, by device
        self._numbers = {stage.key(): 1 for stage in missing}
        self._done = 0

    def __enter__(self) -> Bar:
        self._bar = tqdm(desc="workers", unit="share", disable=None)
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()

    def update(self) -> bool:
        """Look at the store; whether all is there."""
        partly = 0
        for key, stage in list(self._missing.items()):
            if self._store.holds(stage.name, key):
                del self._missing[key]
                self._done += self._numbers[key]
                self._stood(stage)
            elif isinstance(stage, Cut) and not any(
                s.key() in self._missing for s in sources(stage)
            ):
                partly += self._built(stage)
        self._bar.total = sum(self._numbers.values())
        self._bar.n = self._done + partly
        self._bar.refresh()
        return not self._missing

    def tidy(self) -> None:
        """Delete what workers that have ended, or were ended, have left of what is there."""
        for key, ways in self._units.items():
            for units in ways if key not in self._missing else ():
                units.tidy()

    def _built(self, stage: Cut) -> int:
        """The units of a stage that are there, whatever the device of the workers is."""
        if stage.key() not in self._units:
            ways = [replace(self._runtime, device=device) for device in ("cpu", "cuda")]
            self._units[stage.key()] = [Shared(stage, self._store, way) for way in ways]
            self._numbers[stage.key()] = self._units[stage.key()][0].number
        return max(len(units.there) for units in self._units[stage.key()])
