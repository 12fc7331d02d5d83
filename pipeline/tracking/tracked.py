"""Jobs and sweeps that have ended, each logged once: the database says which outcomes it has."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.results.folders import ENDED, RunFolder
from pipeline.run.errors import REFUSED, one_line
from pipeline.run.specs import TrackingSpec
from pipeline.tracking import database
from pipeline.tracking.database import LOGGED, Database, Entry
from pipeline.tracking.entries import Draw, identity, job_entry, opened_sweep, sweep_entry
from stages.errors import InputError

log = logging.getLogger(__name__)


def spec_of(tracking: Any, **changes: Any) -> TrackingSpec:
    """Where runs are logged by a configuration's `tracking`, with some fields changed."""
    given = {**tracking, **changes}
    given.pop("_target_", None)  # an earlier version may have had the class elsewhere
    return TrackingSpec(**given)


def log_job(job: RunFolder, draw: Draw, **changes: Any) -> tuple[str, TrackingSpec | None]:
    """Log a job that has ended, with the pictures that `draw` makes of one with a result.

    Returns `logged` or `known`, as it was logged before, and where; else `off` or `failed`. `changes`
    are fields of its `tracking`.
    """
    what = f"run {job.path.parent.name}/{job.path.name}"

    def send(db: Database) -> str:
        digest, sweep = _digest(job.outcome), job.sweep
        if db.find(identity(job) | {LOGGED: digest}):
            return "known"
        entry = made(job_entry, job, draw)
        db.complete(db.create(entry, _parent(db, sweep) if sweep else None), entry, digest)
        db.close_orphans()  # of commands that were killed
        return "logged"

    try:
        spec = spec_of(job.config.tracking, **changes)
        if not spec.enabled:
            return "off", None
        with FileLock(job.path / ".tracked.lock", timeout=database.LOCK_SECONDS):
            done = database.attempt(spec, what, send)
        return (done, spec) if done else ("failed", None)
    except (*REFUSED, OSError) as error:  # an unreadable configuration, another process
        log.warning("%s not logged: %s", what, one_line(error))
        return "failed" if job.result or isinstance(error, TimeoutError) else "off", None


def log_sweep(folder: RunFolder, draw: Draw, **changes: Any) -> bool:
    """Complete and close the parent run of a sweep that has ended; whether that is done.

    `draw` makes its tables and figures. It is logged where the first of its jobs is that says where.
    """

    def send(db: Database) -> bool:
        digest = _digest(folder.path / ENDED, *(job.outcome for job in folder.ended))
        run_id = _parent(db, folder)
        if db.client.get_run(run_id).data.tags.get(LOGGED) != digest:
            db.complete(run_id, made(sweep_entry, folder, draw), digest)
        return True

    for job in folder.ended:
        with suppress(*REFUSED, OSError):
            spec = spec_of(job.config.tracking, **changes)
            return database.attempt(spec, f"sweep {folder.path.name}", send) or False
    return False


def made(make: Callable[[RunFolder, Draw], Entry], folder: RunFolder, draw: Draw) -> Entry:
    """What is logged of a folder; InputError where that cannot be read, no fault of the database."""
    try:
        return make(folder, draw)
    except Exception as error:
        raise InputError(f"{type(error).__name__}: {error}") from error


def _parent(db: Database, sweep: RunFolder) -> str:
    """The sweep's parent run, which the first of its jobs opens."""
    with FileLock(sweep.path / "parent.lock", timeout=database.LOCK_SECONDS):
        entry = opened_sweep(sweep)
        runs = db.find(entry.identity)
        return runs[-1].info.run_id if runs else db.create(entry)


def _digest(*files: Path) -> str:
    """A hash of files and of the folders' names that they stand in."""
    parts = (file.parent.name.encode() + file.read_bytes() for file in files)
    return hashlib.sha256(b"".join(parts)).hexdigest()
