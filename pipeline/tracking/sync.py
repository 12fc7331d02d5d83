"""Log what the database lacks, and follow its folder where that was moved."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.results import folders
from pipeline.run.errors import one_line
from pipeline.tracking import orphans, tracked, tracking
from pipeline.tracking.relocation import relocate
from pipeline.tracking.tracking import TrackingSpec
from stages.errors import InputError

log = logging.getLogger(__name__)
DEFAULT = Path(__file__).parents[2] / "conf/tracking/default.yaml"


def log_missing(runs: Path, overrides: Sequence[str], close: bool = False) -> int:
    """Log every run below a folder that has ended and is not logged yet.

    `close` also ends sweeps that were killed before their end, and runs whose process is gone. Returns
    the exit status: 1 if anything is still missing, 2 for bad input.
    """

    def work() -> int:
        changes = _changes(overrides)
        if not runs.is_dir():
            raise InputError(f"no runs at {runs}; give their folder with --runs")
        return _sync(runs, changes, close)

    return _status(work)


def relocate_all(overrides: Sequence[str]) -> int:
    """Make a database that was moved with its artifacts find them again; returns the exit status."""

    def work() -> int:
        _relocate(_default(_changes(overrides)))
        return 0

    return _status(work)


def _status(work: Callable[[], int]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _default(changes: dict[str, Any]) -> TrackingSpec:
    """Where runs are logged that no override sends elsewhere."""
    spec: TrackingSpec = instantiate(OmegaConf.load(DEFAULT), **changes)
    return spec


def _relocate(spec: TrackingSpec) -> None:
    """All experiments of this program; nothing where there is no database yet, or a server's."""
    if not _local(spec):
        return
    db, folder = tracking.connect(spec), Path(spec.artifacts).name
    for experiment in db.client.search_experiments():
        if Path(experiment.artifact_location).name == folder:
            relocate(spec, experiment)


def _local(spec: TrackingSpec) -> bool:
    return spec.database is not None and spec.database.exists()


def _changes(overrides: Sequence[str]) -> dict[str, Any]:
    """The fields of tracking that the command line changes for every run."""
    known = [field.name for field in fields(TrackingSpec)]
    for override in overrides:
        group, _, name = override.partition("=")[0].partition(".")
        if group != "tracking" or name not in known or "=" not in override:
            allowed = ", ".join(f"tracking.{name}=" for name in known)
            raise InputError(f"got {override}; choose among {allowed}")
    given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    changes: dict[str, Any] = dict(given.get("tracking", {}))
    default: dict[str, Any] = {"uri": "http:", "experiment": "", "artifacts": ""}
    TrackingSpec(**(default | changes))  # refuses a bad address before anything is read
    return changes


def _sync(runs: Path, changes: dict[str, Any], close: bool) -> int:
    """All jobs, sweep by sweep; stops at a server that does not answer."""
    # nobody waits for the results, so the server may take its time
    changes = {"patience": math.inf} | changes
    done: Counter[str] = Counter()
    specs = {spec.name: spec for spec in [_default(changes)] if close and _local(spec)}
    for folder in sorted(path for path in runs.iterdir() if path.is_dir()):
        jobs = folders.ended(folder)
        outcomes = [_job(job, changes) for job in jobs]
        done.update(outcomes)
        logged = [j for j, o in zip(jobs, outcomes, strict=True) if o in ("logged", "known")]
        if logged and tracked.is_sweep(folder):
            done.update(_sweep(folder, logged[0], changes, close))
        for job in logged:
            spec = tracked.spec_of(job, changes)
            specs[spec.name] = spec
    print(
        f"{done['logged']} runs logged, {done['known']} were logged before, "
        f"{done['off']} have tracking.enabled=false, {done['failed']} could not be logged"
    )
    if close:
        print(f"{sum(map(_orphans, specs.values()))} runs closed whose process is gone")
    return 1 if done["failed"] else 0


def _orphans(spec: TrackingSpec) -> int:
    def send(db: tracking.Database, nothing: None) -> int:
        return orphans.close(db, local=spec.database is not None)

    what = f"the end of runs of experiment {spec.experiment}"
    return tracking.attempt(spec, what, lambda: None, send) or 0


def _job(job: Path, changes: dict[str, Any]) -> str:
    try:
        spec = tracked.spec_of(job, changes)
    except (HydraException, OmegaConfBaseException, OSError) as error:
        log.warning("run %s not logged: %s", job, one_line(error))
        return "failed" if (job / "result.json").exists() else "off"
    if not spec.enabled:
        return "off"
    if tracked.recorded(spec, job):
        return "known"
    if tracked.log_job(spec, job) is None:
        return "failed"
    print(f"logged {job} to {spec.uri}")
    return "logged"


def _sweep(folder: Path, job: Path, changes: dict[str, Any], close: bool) -> list[str]:
    """Closes the parent of a sweep that has ended; what failed."""
    ended = folder / tracked.ENDED
    if close and not ended.exists():
        ended.write_text(json.dumps({"status": "KILLED", "ended": time.time()}))
    if not ended.exists():
        print(f"{folder} has not ended; if it was killed, --close closes it")
        return []
    spec = tracked.spec_of(job, changes)
    return ["failed"] if tracked.log_sweep(spec, folder) is None else []
