"""Log what the database lacks, and follow its folder where that was moved."""

from __future__ import annotations

import logging
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipeline.commands import sweep
from pipeline.results.folders import ENDED, RunFolder
from pipeline.run.errors import REFUSED, one_line
from pipeline.run.shipped import CONF
from pipeline.run.specs import TrackingSpec
from pipeline.tracking import database, tracked
from pipeline.tracking.relocation import relocate
from stages.errors import InputError

log = logging.getLogger(__name__)
Changes = dict[str, Any]  # the fields of tracking that the command line changes for every run


def main(work: Callable[[Changes], int], overrides: Sequence[str]) -> int:
    """Work with the changes that overrides of `tracking` make; returns the status, 2 for bad input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    known = [f"tracking.{field.name}=" for field in fields(TrackingSpec)]
    try:
        for override in overrides:
            if not override.startswith(tuple(known)):
                raise InputError(f"got {override}; choose among {', '.join(known)}")
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
        changes = given.get("tracking", {})
        _default(changes)  # refuses a bad address before anything is read
        return work(changes)
    except REFUSED as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def _default(changes: Changes) -> TrackingSpec:
    """Where runs are logged that no override sends elsewhere."""
    given: Any = OmegaConf.load(CONF / "tracking/default.yaml")
    return tracked.spec_of(given, changes)


def _local(spec: TrackingSpec) -> bool:
    return spec.database is not None and spec.database.exists()


def relocate_all(changes: Changes) -> int:
    """Point all experiments of this program at the artifacts beside their database, if there is one."""
    if _local(spec := _default(changes)):
        client, folder = database.connect(spec).client, Path(spec.artifacts).name
        for experiment in client.search_experiments():
            if Path(experiment.artifact_location).name == folder:
                relocate(spec, experiment)
    return 0


def log_missing(runs: Path, close: bool, changes: Changes) -> int:
    """Log every run below a folder that has ended and is not logged yet.

    `close` also ends sweeps that were killed before their end, and runs whose process is gone. Returns
    1 if anything is still missing.
    """
    if not runs.is_dir():
        raise InputError(f"no runs at {runs}; give their folder with --runs")
    # nobody waits for the results, so the server may take its time
    changes = {"patience": math.inf} | changes
    done: Counter[str] = Counter()
    specs = {spec for spec in [_default(changes)] if close and _local(spec)}
    for folder in (RunFolder(path) for path in sorted(runs.iterdir()) if path.is_dir()):
        outcomes = [_log_job(job, changes) for job in folder.ended]
        done.update(outcome for outcome, _ in outcomes)
        here = [spec for outcome, spec in outcomes if spec and outcome in ("logged", "known")]
        specs.update(here)
        if here and folder.swept and not _log_sweep(here[0], folder, close):
            done["failed"] += 1
    print(
        f"{done['logged']} runs logged, {done['known']} were logged before, "
        f"{done['off']} have tracking.enabled=false, {done['failed']} could not be logged"
    )
    if close:
        what = "the end of runs whose process is gone"
        ended = [database.attempt(spec, what, database.Database.close_orphans) for spec in specs]
        print(f"{sum(filter(None, ended))} runs closed whose process is gone")
    return 1 if done["failed"] else 0


def _log_job(job: RunFolder, changes: Changes) -> tuple[str, TrackingSpec | None]:
    try:
        spec = tracked.spec_of(job.config.tracking, changes)
    except (*REFUSED, OSError) as error:
        log.warning("run %s not logged: %s", job.path, one_line(error))
        return ("failed" if job.result else "off"), None
    outcome = tracked.log_job(spec, job, sweep.job_figures)
    if outcome == "logged":
        print(f"logged {job.path} to {spec.uri}")
    return outcome, spec


def _log_sweep(spec: TrackingSpec, folder: RunFolder, close: bool) -> bool:
    """Close the parent of a sweep that has ended; whether it is logged as far as it has ended."""
    if not folder.read(ENDED):
        if not close:
            print(f"{folder.path} has not ended; if it was killed, --close closes it")
            return True
        folder.write(ENDED, {"status": "KILLED", "ended": time.time()})
    with tempfile.TemporaryDirectory() as place:
        draw = partial(sweep.redrawn, into=Path(place))
        return tracked.log_sweep(spec, folder, draw) is not None
