"""The tracking database: every request to MLflow, none of whose faults may cost a result.

A run is on disk before it is logged. Where the database or its server fails, one warning says so,
the process goes on without it, and `python -m pipeline sync` logs what is missing.
"""

from __future__ import annotations

import logging
import math
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from pipeline.run.shipped import leaves
from pipeline.run.specs import TrackingSpec
from pipeline.store import processes
from pipeline.tracking import view
from pipeline.tracking.relocation import relocate
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

    `identity` are tags that only this run has, `started` and `ended` seconds since 1970. Numbers of
    `result` become metrics, nested names joined by `/`, its strings tags; an infinite or undefined
    number is the tag `nonfinite.<metric>`, because MLflow would store it as 1.8e308. `artifacts`
    are texts, or files by path, by their name among the artifacts. `process` is the host and number of
    the process that the run ends with, if it is not this one.
    """

    name: str
    identity: Mapping[str, str]
    started: float
    ended: float
    status: str = "FINISHED"
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[DatasetInput] = ()
    artifacts: Mapping[str, str | Path] = field(default_factory=dict)
    process: str = ""


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
        tags = {"kind": "job", PROCESS: entry.process or processes.this()} | dict(entry.identity)
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
            same = self.find({COMPUTATION: str(computation)}, "FINISHED")
            for run in same:
                kind = "job" if run is same[-1] else "repeat"
                if run.data.tags["kind"] != kind:
                    self.client.set_tag(run.info.run_id, "kind", kind)
        self.client.set_tag(run_id, LOGGED, digest)
        return run_id

    def _send(self, run_id: str, entry: Entry) -> None:
        """The requests that log an entry; TimeoutError once its time is over."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        end, ended = monotonic() + self.spec.patience, round(1000 * entry.ended)
        metrics: dict[str, float] = {}
        tags = dict(entry.tags)
        for name, value in leaves(entry.result, "/").items():
            if isinstance(value, int | float) and math.isfinite(value):
                metrics[name] = float(value)
            elif value not in (None, {}):
                tags[f"nonfinite.{name}" if isinstance(value, float) else name] = str(value)
        params = {name: str(value) for name, value in leaves(entry.params, "/").items()}
        self.client.log_batch(
            run_id,
            [Metric(name, value, ended, 0) for name, value in metrics.items()],
            [Param(name, value) for name, value in params.items()],
            [RunTag(name, value) for name, value in tags.items()],
        )
        try:
            self.client.log_inputs(run_id, list(entry.inputs))
        except MlflowException:  # another process has created a data set: now it is there
            self.client.log_inputs(run_id, list(entry.inputs))
        for name, content in entry.artifacts.items():
            if monotonic() > end:
                raise TimeoutError("the server is too slow (tracking.patience)")
            if isinstance(content, Path):
                self.client.log_artifact(run_id, str(content), posixpath.dirname(name))
            else:
                self.client.log_text(run_id, content, name)
        for tag, state in view.updates(self.experiment.tags, tags.get("model"), metrics).items():
            self.client.set_experiment_tag(self.experiment.experiment_id, tag, state)

    def close_orphans(self) -> int:
        """Close as KILLED the runs whose process is gone; returns how many they were.

        A run without a process counts in a local database only, one of another program never.
        """
        closed = 0
        for run in self.find({}, "RUNNING"):
            if "sweep" not in run.data.tags:
                continue
            gone = self.spec.database is not None
            if process := run.data.tags.get(PROCESS):
                gone = processes.is_gone(process, run.info.start_time / 1000)
            if gone:
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
        line, where = str(error).partition("\n")[0], ""
        if not isinstance(error, InputError):
            line, where = f"{type(error).__name__}: {line}", f" to {spec.uri}"
        if unreachable(error):
            _lost.add(spec.uri)
            where += ", nor is what follows in this process"
        sync = "`python -m pipeline sync` logs what is missing"
        log.warning("%s not logged%s: %s; %s", what, where, line, sync)
        log.debug("tracking failed", exc_info=True)
        return None


def unreachable(error: BaseException | None) -> bool:
    """Whether an error is of the way to the database or its disk, not of what was sent."""
    from sqlalchemy.exc import OperationalError

    if error is None or isinstance(error, InputError):
        return False
    if isinstance(error, OSError | OperationalError):  # an error of requests is an OSError
        return True
    return unreachable(error.__cause__ or error.__context__)


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
    lock: Any = nullcontext() if file is None else FileLock(f"{file}.lock", LOCK_SECONDS)
    with lock:
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
