"""Finished and failed jobs and sweeps in the tracking database: read from their folders, each logged once.

A job's tracked.json and a sweep's parent.json say in which databases it is, and under which id; they
are written when everything has arrived.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.utils import instantiate

from pipeline.figures.levels import job_config
from pipeline.results import folders
from pipeline.run.errors import REFUSED
from pipeline.tracking import tracking
from pipeline.tracking.entries import failed_entry, job_entry, sweep_entry
from pipeline.tracking.tracking import Database, TrackingSpec

log = logging.getLogger(__name__)
JOB, SWEEP, ENDED = "tracked.json", "parent.json", "ended.json"


def is_sweep(folder: Path) -> bool:
    """Whether a run folder is that of a multirun, whose jobs hang below a parent run."""
    return (folder / "multirun.yaml").exists()


def spec_of(job: Path, changes: Mapping[str, Any] | None = None) -> TrackingSpec:
    """Where a job is to be logged by its configuration, with some fields changed."""
    spec: TrackingSpec = instantiate(job_config(job).tracking, **(changes or {}))
    return spec


def recorded(spec: TrackingSpec, job: Path) -> str | None:
    """The id under which a job's result, as it is now, is in the database."""
    return _recorded(job / JOB, spec, _digest(job))


def log_failure(job: Path) -> None:
    """Log a job that has left its reason to fail; nothing where that is its tracking itself."""
    if (spec := _named(job)) is not None:
        log_job(spec, job)


def _named(job: Path) -> TrackingSpec | None:
    """Where a job is to be logged; None for one whose configuration is not there or says nothing."""
    try:
        return spec_of(job)
    except (*REFUSED, OSError):
        return None


def log_job(spec: TrackingSpec, job: Path) -> str | None:
    """The run id of a job that has ended, which is logged if need be; None if it could not be."""
    if not spec.enabled:
        return None

    def send(db: Database, entry: Any) -> str:
        sweep = folders.sweep(job)
        parent = None if sweep is None else _parent(db, spec, sweep)
        run_id = tracking.create(db, entry, parent)
        tracking.complete(db, run_id, entry)
        return run_id

    try:
        with FileLock(job / ".tracked.lock", timeout=0):
            digest = _digest(job)
            if known := _recorded(job / JOB, spec, digest):
                return known
            what = f"run {job.parent.name}/{job.name}"
            failed = _outcome(job).name == folders.RECORD
            prepare = failed_entry if failed else job_entry
            run_id = tracking.attempt(spec, what, lambda: prepare(job), send)
            if run_id is not None:
                _record(job / JOB, spec, run_id, digest)
            return run_id
    except Timeout:
        log.warning("run %s/%s is being logged by another process", job.parent.name, job.name)
        return None


def end_sweep(folder: Path, status: str, files: Sequence[Path]) -> None:
    """Record that a sweep has ended and close its parent run with its table and figures.

    `status` is FINISHED, FAILED or KILLED, `files` are what was written of tables and figures.
    """
    specs = [spec for job in folders.ended(folder) if (spec := _named(job)) is not None]
    if specs and is_sweep(folder):
        record = {"status": status, "ended": time.time()}
        (folder / ENDED).write_text(json.dumps(record))
        log_sweep(specs[0], folder, files)


def log_sweep(spec: TrackingSpec, folder: Path, files: Sequence[Path] | None = None) -> str | None:
    """The id of an ended sweep's parent run, complete and closed; None if that failed.

    Without `files` the table and the figures are made anew from the results.
    """
    digest = hashlib.sha256((folder / ENDED).read_bytes())
    for job in folders.ended(folder):
        digest.update(f"{job.name} {_digest(job)}".encode())
    if known := _recorded(folder / SWEEP, spec, digest.hexdigest()):
        return known

    def send(db: Database, entry: Any) -> str:
        run_id = _parent(db, spec, folder)
        db.client.update_run(run_id, name=entry.name)  # now its models are known
        tracking.complete(db, run_id, entry)
        return run_id

    with tempfile.TemporaryDirectory() as temporary:
        run_id = tracking.attempt(
            spec,
            f"sweep {folder.name}",
            lambda: sweep_entry(
                folder, _drawn(folder, Path(temporary)) if files is None else files
            ),
            send,
        )
    if run_id is not None:
        _record(folder / SWEEP, spec, run_id, digest.hexdigest())
    return run_id


def _parent(db: Database, spec: TrackingSpec, folder: Path) -> str:
    """The sweep's parent run, opened by whichever of its jobs comes first."""
    with FileLock(folder / "parent.lock", timeout=tracking.LOCK_SECONDS):
        if known := _recorded(folder / SWEEP, spec):
            return known
        entry = sweep_entry(folder)
        found = tracking.find(db, entry.identity)
        run_id = found[-1].info.run_id if found else tracking.create(db, entry)
        _record(folder / SWEEP, spec, run_id, None)
        return run_id


def _drawn(folder: Path, into: Path) -> list[Path]:
    """The tables and figures of a sweep, as the end of it writes them."""
    from pipeline.figures import sweep
    from pipeline.tables import tables

    if not folders.finished(folder):
        return []
    name = sweep.name(folder)
    with redirect_stdout(io.StringIO()):
        tables.sweep_table(folder, name, into)
    try:
        sweep.draw(folder, name, into)
    except Exception:
        log.warning("sweep %s is logged without its figures", folder.name, exc_info=True)
    return sorted(into.iterdir())


def _outcome(job: Path) -> Path:
    """How a job has ended; the later, where it was run in its folder again."""
    files = [job / name for name in folders.OUTCOMES if (job / name).exists()]
    return max(files, key=lambda path: path.stat().st_mtime)


def _digest(job: Path) -> str:
    return hashlib.sha256(_outcome(job).read_bytes()).hexdigest()


def _recorded(file: Path, spec: TrackingSpec, result: str | None = None) -> str | None:
    """The run id in a record, if it is of this database (and of this result, if one is given)."""
    known = json.loads(file.read_text()) if file.exists() else {}
    entry = known.get(spec.name)
    if entry is None or (result is not None and entry["result"] != result):
        return None
    return str(entry["run_id"])


def _record(file: Path, spec: TrackingSpec, run_id: str, result: str | None) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    known[spec.name] = {"run_id": run_id, "result": result}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(known, indent=1))
    part.rename(file)
