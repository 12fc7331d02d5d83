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
    missing: dict[str, Stage] = {}
    shared: dict[str, Shared] = {}  # whose units this worker has asked for
    for stage in stages:
        if (artifact := store.find(stage.step)) is None:
            missing[stage.key()] = stage
        else:
            check(stage, artifact)
    while missing:
        busy = False
        for key, stage in list(missing.items()):
            if any(source.key() in missing for source in sources(stage)):
                continue
            artifact = store.find(stage.step)
            if artifact is None:
                if isinstance(stage, Cut) and key not in shared:
                    shared[key] = Shared(stage, store, runtime)
                artifact, worked = _built(stage, shared.get(key), store, runtime, worker, offloaded)
                busy |= worked
            if artifact is not None:
                del missing[key]
                if key in shared:
                    shared[key].tidy()
                check(stage, artifact)
                busy = True
        if not busy:
            time.sleep(POLL_SECONDS)


def _built(
    stage: Stage,
    shared: Shared | None,
    store: Store,
    runtime: Running,
    worker: tuple[int, int],
    offloaded: bool,
) -> tuple[Artifact | None, bool]:
    """The artifact if this worker has finished it, and whether it has worked at it or at its `shared`
    units."""
    if shared is None:
        with store.claim(stage.step) as make:
            artifact = None if make is None else make(stage.maker(store, runtime))
        return artifact, artifact is not None
    number, count = worker
    most = min(TOGETHER, math.ceil(shared.number / count)) if offloaded else None
    worked = shared.work(number / count, most)
    return shared.merge(), worked
