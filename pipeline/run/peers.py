"""One worker of several: it builds whatever is missing of a conversion and no other is building."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

from pipeline.run.shares import Cut, Shared
from pipeline.run.stage import Running, Stage, sources
from pipeline.store.store import Artifact, Store

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
TOGETHER = 16  # units that pass a model together whose layers are read from disk


def work(
    stages: Sequence[Stage],
    store: Store,
    runtime: Running,
    worker: tuple[int, int],
    offloaded: bool,
    check: Callable[[Stage, Artifact], None],
) -> None:
    """Return once all artifacts are there; `worker` is this one's number and how many there are.

    Every worker does this over the same store, and no other tells it what to do. `check` is called with
    each artifact, which may raise InputError. Of a model that is `offloaded`, some units pass together.
    """
    missing, begun = {stage.key(): stage for stage in stages}, set[str]()
    while missing:
        busy = False
        for key, stage in list(missing.items()):
            artifact = store.find(stage.step)
            if artifact is None and not any(s.key() in missing for s in sources(stage)):
                begun.add(key)
                artifact, worked = _built(stage, store, runtime, worker, offloaded)
                busy |= worked
            if artifact is not None:
                del missing[key]
                if key in begun and isinstance(stage, Cut):
                    Shared(stage, store, runtime).tidy()
                check(stage, artifact)
                busy = True
        if not busy:
            time.sleep(POLL_SECONDS)


def _built(
    stage: Stage, store: Store, runtime: Running, worker: tuple[int, int], offloaded: bool
) -> tuple[Artifact | None, bool]:
    """The artifact if this worker has finished it, and whether it has worked at it."""
    if not isinstance(stage, Cut):
        with store.claim(stage.step) as make:
            artifact = None if make is None else make(stage.maker(store, runtime))
        return artifact, artifact is not None
    shared, (number, count) = Shared(stage, store, runtime), worker
    most = min(TOGETHER, math.ceil(shared.number / count)) if offloaded else None
    worked = shared.work(number / count, most)
    return shared.merge(), worked
