"""Every call of MLflow: what the database is told of a run, and that no fault of it costs a result.

A run is on disk before it is logged. Where the database or its server fails, one warning says so,
the process goes on without it, and `python -m pipeline sync` logs what is missing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from filelock import BaseFileLock, FileLock

from pipeline.tracking import view
from pipeline.tracking.entry import Entry, flat, measured
from pipeline.tracking.relocation import relocate
from stages.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

log = logging.getLogger(__name__)
T = TypeVar("T")
Prepared = TypeVar("Prepared")

SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
LOCK_SECONDS = 120
BATCH = 100  # params or tags a request, MLflow's limit
PAGE = 1000  # runs that a search brings
PROCESS = "process"  # tag: host and number of the process that opened a run
COMPUTATION = "computation"  # tag: a hash of the artifacts, by which a repeated job is known
DIGEST = 36  # characters of a data set's digest, MLflow's limit
SYNC = "`python -m pipeline sync` logs what is missing"
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
class TrackingSpec:
    """Where runs are logged: `sqlite:///outputs/mlflow/mlflow.db` or a server's address.

    `artifacts` is the folder of the tables and figures beside a database, which may move with it; a
    server uses its own.
    `patience` is how many seconds logging one run may take before it is left to a later sync.
    Raises InputError for an address that MLflow cannot log to.
    """

    uri: str
    experiment: str
    artifacts: str
    enabled: bool = True
    patience: float = 20.0

    def __post_init__(self) -> None:
        scheme = urlsplit(self.uri).scheme.partition("+")[0]
        if scheme not in SCHEMES:
            raise InputError(
                f"tracking.uri={self.uri} is none of {', '.join(SCHEMES)}: folders are no longer "
                "supported by MLflow 3, give sqlite:///FOLDER/mlflow.db or a server's address"
            )
        if scheme == "sqlite" and self.database is None:
            raise InputError(
                f"tracking.uri={self.uri} names no file: give sqlite:///FOLDER/mlflow.db"
            )

    @property
    def database(self) -> Path | None:
        """Return the file of a sqlite database, None for a server."""
        parts = urlsplit(self.uri)
        name = parts.path[1:]
        return Path(name) if parts.scheme.startswith("sqlite") and name else None

    @property
    def name(self) -> str:
        """By which a job remembers where it was logged."""
        return f"{self.uri} {self.experiment}"


@dataclass(frozen=True)
class Database:
    """A connected client, its experiment and the tags of that, and when (monotonic) to give up."""

    client: MlflowClient
    experiment: str
    tags: Mapping[str, str]
    deadline: float

    def check(self) -> None:
        """TimeoutError once the time for this attempt is over."""
        if time.monotonic() > self.deadline:
            raise TimeoutError("the server is too slow (tracking.patience)")


def attempt(
    spec: TrackingSpec,
    what: str,
    prepare: Callable[[], Prepared],
    send: Callable[[Database, Prepared], T],
) -> T | None:
    """What `send` returns, or None where nothing was sent or something failed, which is a warning.

    A server that is down or slow is not tried again by this process; what a single run lacks stops
    only that run.
    """
    if not spec.enabled or spec.uri in _lost:
        return None
    try:
        prepared = prepare()
    except Exception as error:
        _warn(f"{what} not logged: {_reason(error)}; {SYNC}")
        return None
    try:
        return send(connect(spec), prepared)
    # MLflow lets errors of sqlalchemy, alembic, requests and the file system through; none of
    # them may cost the caller a result
    except Exception as error:
        rest = ""
        if unreachable(error):
            _lost.add(spec.uri)
            rest = ", nor is what follows in this process"
        _warn(f"{what} not logged to {spec.uri}{rest}: {_reason(error)}; {SYNC}")
        return None


def lost(spec: TrackingSpec) -> bool:
    """Whether this process has given the address up."""
    return spec.uri in _lost


def unreachable(error: BaseException) -> bool:
    """Whether an error is of the way to the database or its disk, not of what was sent."""
    from sqlalchemy.exc import OperationalError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError | OperationalError):  # an error of requests is an OSError
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _reason(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    return line if isinstance(error, InputError) else f"{type(error).__name__}: {line}"


def _warn(line: str) -> None:
    log.warning("%s", line)
    log.debug("tracking failed", exc_info=True)


def connect(spec: TrackingSpec) -> Database:
    """Connect to the database and the experiment, both created on first use."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one warning is ours
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with _set_up_lock(spec):
        client = MlflowClient(tracking_uri=spec.uri)
        found = client.get_experiment_by_name(spec.experiment)
        if found is not None:
            relocate(spec, found)
        else:
            location = None if urlsplit(spec.uri).scheme.startswith("http") else spec.artifacts
            # on a server another process may be first
            with suppress(MlflowException):
                client.create_experiment(spec.experiment, location)
            found = client.get_experiment_by_name(spec.experiment)
    if found is None:
        raise ConnectionError(f"experiment {spec.experiment} cannot be created")
    # a new sqlite database takes seconds, which are no slowness of a server
    deadline = time.monotonic() + spec.patience
    return Database(client, found.experiment_id, found.tags, deadline)


def _set_up_lock(spec: TrackingSpec) -> BaseFileLock | nullcontext[None]:
    """Return the lock without which two processes would create one sqlite database at once."""
    if spec.database is None:
        return nullcontext()
    spec.database.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{spec.database}.lock", timeout=LOCK_SECONDS)


def find(db: Database, tags: Mapping[str, str], status: str | None = None) -> list[Run]:
    """The runs that have these tags, and a status if one is given; the one started last is first."""
    terms = [f"tags.`{name}` = {view.quoted(value)}" for name, value in tags.items()]
    terms += [f"attributes.status = '{status}'"] if status else []
    return list(db.client.search_runs([db.experiment], " and ".join(terms), max_results=PAGE))


def create(db: Database, entry: Entry, parent: str | None = None) -> str:
    """Open a run, as a child if `parent` is given, and return its id."""
    tags = {"kind": "job", PROCESS: f"{socket.gethostname()} {os.getpid()}"} | dict(entry.identity)
    tags |= {"mlflow.parentRunId": parent} if parent else {}
    start = round(1000 * entry.started)
    run = db.client.create_run(db.experiment, start, tags, entry.name)
    return str(run.info.run_id)


def complete(db: Database, run_id: str, entry: Entry) -> None:
    """Log all of an entry into an open run and close it; then it is the only one of its identity.

    What a failed attempt has left is deleted only now, so that no run is missing in between.
    """
    client = db.client
    try:
        for part in _parts(client, run_id, entry):
            part()
            db.check()
    except BaseException as error:
        if not unreachable(error):
            with suppress(Exception):  # the first error is the one to report
                client.set_terminated(run_id, "FAILED")
        raise
    numbers, labels = measured(entry)
    for tag, state in view.updates(db.tags, labels.get("model"), numbers).items():
        client.set_experiment_tag(db.experiment, tag, state)
    client.set_terminated(run_id, entry.status, round(1000 * entry.ended))
    computed = {entry.tags.get(COMPUTATION)}
    for other in find(db, entry.identity):
        if other.info.run_id != run_id:
            client.delete_run(other.info.run_id)
            computed.add(other.data.tags.get(COMPUTATION))
    for digest in computed - {None}:
        _mark_repeats(db, str(digest))


def _mark_repeats(db: Database, computation: str) -> None:
    """Make the first run of a computation its job, and repeats of those that took it from the store."""
    runs = find(db, {COMPUTATION: computation}, "FINISHED")
    runs.sort(key=lambda run: (run.info.start_time, run.info.run_id))
    for run, kind in zip(runs, ["job"] + ["repeat"] * len(runs), strict=False):
        if run.data.tags["kind"] != kind:
            db.client.set_tag(run.info.run_id, "kind", kind)


def _parts(client: MlflowClient, run_id: str, entry: Entry) -> Iterator[Callable[[], Any]]:
    """The requests that log an entry."""
    from mlflow.entities import Metric, Param, RunTag

    numbers, labels = measured(entry)
    at = round(1000 * entry.ended)
    metrics = [Metric(name, value, at, 0) for name, value in numbers.items()]
    yield partial(client.log_batch, run_id, metrics=metrics)
    params = [Param(name, str(value)) for name, value in flat(entry.params)]
    tags = [RunTag(name, value) for name, value in labels.items()]
    for i in range(0, max(len(params), len(tags)), BATCH // 2):
        some = slice(i, i + BATCH // 2)  # the limit is on both together
        yield partial(client.log_batch, run_id, params=params[some], tags=tags[some])
    for data in _inputs(entry):
        yield partial(_log_input, client, run_id, data)
    for name, document in entry.documents.items():
        yield partial(client.log_text, run_id, document, name)
    for name, table in entry.tables.items():
        yield partial(client.log_table, run_id, table, name)
    for folder, paths in entry.files.items():
        for path in paths:
            yield partial(client.log_artifact, run_id, str(path), folder)


def _log_input(client: MlflowClient, run_id: str, data: DatasetInput) -> None:
    """Log a data set; of two processes that MLflow lets create it at once, one has to ask again."""
    from mlflow.exceptions import MlflowException

    try:
        client.log_inputs(run_id, [data])
    except MlflowException:  # now it is there
        client.log_inputs(run_id, [data])


def _inputs(entry: Entry) -> list[DatasetInput]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for text in entry.data:
        source, profile = json.dumps(dict(text.source)), json.dumps(dict(text.profile))
        told = Dataset(text.name, text.digest[:DIGEST], text.source_type, source, None, profile)
        inputs.append(DatasetInput(told, [InputTag("mlflow.data.context", text.context)]))
    return inputs


if __name__ == "__main__":
    raise SystemExit("nothing was done: the command is `python -m pipeline sync`")
