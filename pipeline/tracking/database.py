"""The tracking database: every request to MLflow, none of whose faults may cost a result.

A run is on disk before it is logged. Where the database or its server fails, one warning says so,
the process goes on without it, and `python -m pipeline sync` logs what is missing.
"""

from __future__ import annotations

import io
import logging
import math
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from pipeline.run.shipped import leaves
from pipeline.run.specs import TrackingSpec
from pipeline.store import processes
from pipeline.tracking import view
from stages.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Experiment, Run

log = logging.getLogger(__name__)
T = TypeVar("T")

LOCK_SECONDS = 120
PROCESS = "process"  # tag: host and number of the process that opened a run
COMPUTATION = "computation"  # tag: a hash of the artifacts, by which a repeated job is known
LOGGED = "logged"  # tag, set last: a hash of what the run was logged from
# what a user has set in the environment stands
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_lost: set[str] = set()  # addresses that failed in this process, which are not tried again


@dataclass(frozen=True)
class Entry:
    """What is logged of one run.

    `identity` are tags that only this run has, `started` and `ended` seconds since 1970. Names of
    nested `tags` are joined by a dot. Numbers of `result` become metrics, nested names joined by `/`,
    its strings tags; an infinite or undefined number is the tag `nonfinite.<metric>`, because MLflow
    would store it as 1.8e308. `process` is the host and number of the process that the run ends with.
    """

    name: str
    identity: Mapping[str, str]
    started: float
    ended: float
    status: str = "FINISHED"
    tags: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[DatasetInput] = ()
    artifacts: Mapping[str, bytes] = field(default_factory=dict)
    process: str = field(default_factory=processes.this)


@dataclass(frozen=True)
class Database:
    """A connected client and its experiment."""

    spec: TrackingSpec
    client: MlflowClient
    experiment: Experiment

    def find(self, tags: Mapping[str, str], status: str | None = None) -> list[Run]:
        """The runs that have these tags, and a status if one is given; the latest start first."""
        terms = [f"tags.`{name}` = {view.quoted(value)}" for name, value in tags.items()]
        terms += [f"attributes.status = '{status}'"] if status else []
        return list(self.client.search_runs([self.experiment.experiment_id], " and ".join(terms)))

    def create(self, entry: Entry, parent: str | None = None) -> str:
        """Open a run, as a child if `parent` is given, and return its id."""
        tags = {"kind": "job", PROCESS: entry.process, **entry.identity}
        tags |= {"mlflow.parentRunId": parent} if parent else {}
        number, start = self.experiment.experiment_id, round(1000 * entry.started)
        return str(self.client.create_run(number, start, tags, entry.name).info.run_id)

    def complete(self, run_id: str, entry: Entry, digest: str = "") -> str:
        """Log all of an entry into an open run and close it; then it is the only one of its identity.

        What a failed attempt has left is deleted only now, so that no run is missing in between. Of
        the runs of one computation the first is its job, others took it from the store: repeats.
        """
        try:
            self._send(run_id, entry)
        except BaseException as error:
            if not unreachable(error):
                with suppress(Exception):  # the first error is the one to report
                    self.client.set_terminated(run_id, "FAILED")
            raise
        self.client.set_terminated(run_id, entry.status, round(1000 * entry.ended))
        runs = self.find(entry.identity)
        for run in runs:
            if run.info.run_id != run_id:
                self.client.delete_run(run.info.run_id)
        for computation in {run.data.tags.get(COMPUTATION) for run in runs} - {None}:
            kind = "job"
            for run in reversed(self.find({COMPUTATION: str(computation)}, "FINISHED")):
                if run.data.tags["kind"] != kind:
                    self.client.set_tag(run.info.run_id, "kind", kind)
                kind = "repeat"
        self.client.set_tag(run_id, LOGGED, digest)
        return run_id

    def _send(self, run_id: str, entry: Entry) -> None:
        """The requests that log an entry; TimeoutError once its time is over."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        end, ended = monotonic() + self.spec.patience, round(1000 * entry.ended)
        tags = {"mlflow.runName": entry.name}
        tags |= {name: value for name, value in leaves(entry.tags).items() if value is not None}
        metrics = []
        for name, value in leaves(entry.result, "/").items():
            if isinstance(value, int | float) and math.isfinite(value):
                metrics.append(Metric(name, float(value), ended, 0))
            elif value not in (None, {}):
                tags[f"nonfinite.{name}" if isinstance(value, float) else name] = value
        params = [Param(name, value) for name, value in entry.params.items()]
        labels = [RunTag(name, str(value)) for name, value in tags.items()]
        self.client.log_batch(run_id, metrics, params, labels)
        try:
            self.client.log_inputs(run_id, list(entry.inputs))
        except MlflowException:  # another process has created a data set: now it is there
            self.client.log_inputs(run_id, list(entry.inputs))
        for name, content in entry.artifacts.items():
            if monotonic() > end:
                raise TimeoutError("the server is too slow (tracking.patience)")
            self.client.log_stream(run_id, io.BytesIO(content), name)
        views = view.updates(self.experiment.tags, tags.get("model"), [m.key for m in metrics])
        for tag, state in views.items():
            self.client.set_experiment_tag(self.experiment.experiment_id, tag, state)

    def close_orphans(self) -> int:
        """Close as KILLED the runs whose process is gone; returns how many they were.

        A run without a process counts in a local database only, one of another program never.
        """
        closed = 0
        for run in self.find({}, "RUNNING"):
            tags, local = run.data.tags, self.spec.database is not None
            since = run.info.start_time / 1000
            gone = processes.is_gone(tags[PROCESS], since) if PROCESS in tags else local
            if gone and "sweep" in tags:
                self.client.set_terminated(run.info.run_id, "KILLED")
                closed += 1
        return closed


def attempt(spec: TrackingSpec, what: str, send: Callable[[Database], T]) -> T | None:
    """What `send` returns, or None where something failed, which is a warning.

    A server that is down or slow is not tried again by this process; what a single run lacks stops
    only that run.
    """
    if not spec.enabled or spec.uri in _lost:
        return None
    try:
        return send(connect(spec))
    # MLflow lets errors of sqlalchemy, alembic, requests and the file system through; none of
    # them may cost the caller a result
    except Exception as error:
        reason = str(error).partition("\n")[0]
        if not isinstance(error, InputError):
            reason = f"{type(error).__name__}: {reason}"
        if unreachable(error):
            _lost.add(spec.uri)
            reason += ", nor is what follows in this process"
        line = "%s not logged to %s: %s; `python -m pipeline sync` logs what is missing"
        log.warning(line, what, spec.uri, reason, exc_info=log.isEnabledFor(logging.DEBUG))
        return None


def unreachable(error: BaseException | None) -> bool:
    """Whether an error is of the way to the database or its disk, not of what was sent."""
    from sqlalchemy.exc import OperationalError

    if error is None or isinstance(error, InputError):
        return False
    lost = isinstance(error, OSError | OperationalError)  # an error of requests is an OSError
    return lost or unreachable(error.__cause__ or error.__context__)


def connect(spec: TrackingSpec) -> Database:
    """Connect to the database and the experiment, both created on first use."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one warning is ours
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    # two processes must not create one sqlite database at once
    file = spec.database
    with FileLock(f"{file}.lock", LOCK_SECONDS) if file else nullcontext():
        client = MlflowClient(tracking_uri=spec.uri)
        experiment = client.get_experiment_by_name(spec.experiment)
        if experiment is None:
            place = None if spec.uri.startswith("http") else spec.artifacts
            with suppress(MlflowException):  # on a server another process may be first
                client.create_experiment(spec.experiment, place)
            experiment = client.get_experiment_by_name(spec.experiment)
        assert experiment is not None
        relocate(spec, experiment)
    return Database(spec, client, experiment)


def relocate(spec: TrackingSpec, experiment: Experiment) -> None:
    """Point an experiment of a database that was moved at `spec.artifacts`, if its artifacts came along.

    MLflow keeps their places as absolute paths, and has no command that changes one. They came along
    if that folder holds what its runs have logged, if any has, and the folder that MLflow knows is gone
    or, of a database that was copied, lies elsewhere than the database. A run keeps its place if only
    that has its artifacts. Raises InputError if neither place has any.
    """
    from mlflow.utils.file_utils import get_local_path_or_none as local

    places = [local(place) for place in (experiment.artifact_location, spec.artifacts)]
    if spec.database is None or None in places:
        return
    stored, given = (Path(place).resolve() for place in places)
    beside = spec.database.resolve().parent
    copied = given.is_relative_to(beside) and not stored.is_relative_to(beside)
    if stored == given or (stored.is_dir() and not copied):
        return
    number = experiment.experiment_id
    with closing(sqlite3.connect(spec.database)) as connection, connection:
        query = "SELECT run_uuid, artifact_uri, end_time FROM runs WHERE experiment_id = ?"
        runs = connection.execute(query, [number]).fetchall()
        here = {run for run, _, _ in runs if (given / run).is_dir()}
        if not here and any(end is not None for _, _, end in runs):
            if stored.is_dir():
                return
            raise InputError(
                f"the artifacts of experiment {experiment.name} were in {stored}, which is gone, and "
                f"are not in {given}: move them there, or give tracking.experiment=ANOTHER"
            )
        left = {run for run, uri, _ in runs if run not in here and Path(local(uri)).is_dir()}
        moved = [(f"{given}/{run}/artifacts", run) for run, _, _ in runs if run not in left]
        update = "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?"
        connection.execute(update, [str(given), number])
        connection.executemany("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", moved)
    log.info("the artifacts of %s are in %s, no longer in %s", experiment.name, given, stored)
    if left:
        kept = "%d runs of experiment %s keep their artifacts in %s"
        log.warning(kept, len(left), experiment.name, stored)
