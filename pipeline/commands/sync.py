"""Log what the database lacks, and follow its folder where that was moved."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipeline.commands import sweep
from pipeline.results.folders import ENDED, RunFolder
from pipeline.run.shipped import CONF
from pipeline.run.specs import TrackingSpec
from pipeline.tracking import database, tracked
from stages.errors import InputError


def relocate_all(overrides: Sequence[str]) -> None:
    """Point all experiments of this program at the artifacts beside their database, if there is one."""
    _, spec = _asked(overrides)
    if spec.database is not None and spec.database.exists():
        client, folder = database.connect(spec).client, Path(spec.artifacts).name
        for experiment in client.search_experiments():
            if Path(experiment.artifact_location).name == folder:
                database.relocate(spec, experiment)


def log_missing(runs: Path, close: bool, overrides: Sequence[str]) -> int:
    """Log every run below a folder that has ended and is not logged yet.

    `close` also ends sweeps that were killed before their end, and runs whose process is gone. Returns
    1 if anything is still missing.
    """
    changes, default = _asked(overrides)
    if not runs.is_dir():
        raise InputError(f"no runs at {runs}; give their folder with --runs")
    # nobody waits for the results, so the server may take its time
    changes = {"patience": math.inf} | changes
    done: Counter[str] = Counter()
    specs = {default} if default.database is not None and default.database.exists() else set()
    for folder in (RunFolder(path) for path in sorted(runs.iterdir()) if path.is_dir()):
        here = set()
        for job in folder.ended:
            outcome, spec = tracked.log_job(job, sweep.job_figures, **changes)
            done[outcome] += 1
            here |= {spec} if spec else set()
            if spec and outcome == "logged":
                print(f"logged {job.path} to {spec.uri}")
        specs |= here
        if here and folder.swept and not _log_sweep(folder, close, changes):
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


def _asked(overrides: Sequence[str]) -> tuple[dict[str, Any], TrackingSpec]:
    """The fields of tracking that overrides change, and where a run is logged that has no others.

    Raises InputError for an override of something else, and for an address that cannot be.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    known = tuple(f"tracking.{field.name}=" for field in fields(TrackingSpec))
    for override in overrides:
        if not override.startswith(known):
            raise InputError(f"got {override}; choose among {', '.join(known)}")
    changes = dict(OmegaConf.from_dotlist(list(overrides)).get("tracking", {}))
    return changes, tracked.spec_of(OmegaConf.load(CONF / "tracking/default.yaml"), **changes)


def _log_sweep(folder: RunFolder, close: bool, changes: Mapping[str, Any]) -> bool:
    """Close the parent of a sweep that has ended; whether it is logged as far as it has ended."""
    if not folder.read(ENDED):
        if not close:
            print(f"{folder.path} has not ended; if it was killed, --close closes it")
            return True
        folder.end("KILLED")
    with tempfile.TemporaryDirectory() as place:
        return tracked.log_sweep(folder, partial(sweep.redrawn, into=Path(place)), **changes)
