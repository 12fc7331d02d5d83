"""Jobs and sweeps that have ended, each logged once: the database says which outcomes it has."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from pipeline.results.folders import ENDED, RESULT, RunFolder
from pipeline.run.errors import REFUSED
from pipeline.run.specs import TrackingSpec
from pipeline.tracking import database
from pipeline.tracking.database import LOGGED, Database, Entry
from pipeline.tracking.entries import identity, job_entry, opened_sweep, sweep_entry
from stages.errors import InputError

log = logging.getLogger(__name__)
Draw = Callable[[RunFolder], Sequence[Path]]  # what a run's folder has of tables and figures


def spec_of(tracking: DictConfig, changes: Mapping[str, Any] | None = None) -> TrackingSpec:
    """Where runs are logged by a configuration's `tracking`, with some fields changed."""
    given: Any = OmegaConf.to_container(tracking)
    given.pop("_target_", None)  # an earlier version may have had the class elsewhere
    return TrackingSpec(**(given | dict(changes or {})))


def known_spec(job: RunFolder) -> TrackingSpec | None:
    """Where a job is to be logged; None for one whose configuration is not there or says nothing."""
    try:
        return spec_of(job.config.tracking)
    except (*REFUSED, OSError):
        return None


def log_job(spec: TrackingSpec, job: RunFolder, draw: Draw) -> str:
    """Log a job that has ended, with the pictures that `draw` makes of one with a result.

    Returns `logged`, `known` where it was logged before, `off` or `failed`.
    """
    what = f"run {job.path.parent.name}/{job.path.name}"

    def send(db: Database) -> str:
        digest, sweep = _digest(job.outcome), job.sweep
        if db.find(identity(job) | {LOGGED: digest}):
            return "known"
        entry = made(lambda: job_entry(job, draw(job) if job.outcome.name == RESULT else ()))
        parent = None if sweep is None else _parent(db, sweep)
        db.complete(db.create(entry, parent), entry, digest)
        return "logged"

    try:
        with FileLock(job.path / ".tracked.lock", timeout=0):
            return (database.attempt(spec, what, send) or "failed") if spec.enabled else "off"
    except Timeout:
        log.warning("%s is being logged by another process", what)
        return "failed"


def end_sweep(folder: RunFolder, status: str, files: Sequence[Path]) -> None:
    """Record that a sweep has ended and close its parent run with its tables and figures.

    `status` is FINISHED, FAILED or KILLED, `files` are what was written of tables and figures.
    """
    spec = next((spec for job in folder.ended if (spec := known_spec(job)) is not None), None)
    if spec is not None and folder.swept:
        folder.write(ENDED, {"status": status, "ended": time.time()})
        log_sweep(spec, folder, lambda sweep: files)


def log_sweep(spec: TrackingSpec, folder: RunFolder, draw: Draw) -> str | None:
    """The id of an ended sweep's parent run, complete and closed; None if that failed."""

    def send(db: Database) -> str:
        digest = _digest(folder.path / ENDED, *(job.outcome for job in folder.ended))
        run_id = _parent(db, folder)
        if db.client.get_run(run_id).data.tags.get(LOGGED) != digest:
            entry = made(lambda: sweep_entry(folder, draw(folder)))
            db.client.update_run(run_id, name=entry.name)  # now its models are known
            db.complete(run_id, entry, digest)
        return run_id

    return database.attempt(spec, f"sweep {folder.path.name}", send)


def made(make: Callable[[], Entry]) -> Entry:
    """What `make` returns; InputError where an entry cannot be made, which is no fault of the database."""
    try:
        return make()
    except Exception as error:
        raise InputError(f"{type(error).__name__}: {error}") from error


def _parent(db: Database, sweep: RunFolder) -> str:
    """The sweep's parent run, which the first of its jobs opens."""
    with FileLock(sweep.path / "parent.lock", timeout=database.LOCK_SECONDS):
        entry = opened_sweep(sweep)
        runs = db.find(entry.identity)
        return str(runs[-1].info.run_id) if runs else db.create(entry)


def _digest(*files: Path) -> str:
    """A hash of files and of the folders' names that they stand in."""
    parts = (file.parent.name.encode() + file.read_bytes() for file in files)
    return hashlib.sha256(b"".join(parts)).hexdigest()
