"""Log runs and sweeps to MLflow: every call of it is here, and none can fail a run.

The result of a run is on disk before it is logged, so whatever goes wrong with the database or
the server costs a warning and a missing row in the dashboard, never a result.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from filelock import BaseFileLock, FileLock

from stages.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
T = TypeVar("T")

SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
LOCK_SECONDS = 120
# what a user has set in the environment stands
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class TrackingSpec:
    """Where runs are logged: `sqlite:///outputs/mlflow/mlflow.db` or a server's address.

    `artifacts` is the folder of the tables and figures beside a database; a server uses its own.
    Raises InputError for an address that MLflow cannot log to.
    """

    uri: str
    experiment: str
    artifacts: str
    enabled: bool = True

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


def log_run(
    spec: TrackingSpec,
    *,
    name: str,
    result: Mapping[str, Any],
    axes: Mapping[str, Any],
    per_site: "pd.DataFrame | None",
    figures: "Mapping[str, Figure | Path]",
    config_yaml: str,
    tags: Mapping[str, str],
    parent_run_id: str | None,
) -> str | None:
    """Log one finished run and return its id, or None where it could not be logged.

    Axes become params. Every other number of `result` becomes a metric, nested names joined by
    `/` (`seconds/capture`), its strings tags; an infinite or undefined number is the tag
    `nonfinite.<metric>`, because MLflow would store it as 1.8e308.
    """

    def send() -> str:
        client, experiment = _connect(spec)
        run_id = _create(client, experiment, name, tags, parent_run_id)
        try:
            _log_values(client, run_id, result, axes)
            _log_files(client, run_id, per_site, figures, config_yaml)
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id)
        return run_id

    return _attempt(spec, f"run {name}", send)


def start_sweep(spec: TrackingSpec, name: str, tags: Mapping[str, str]) -> str | None:
    """Open the parent run of a sweep's jobs and return its id, or None where that failed."""
    return _attempt(
        spec, f"sweep {name}", lambda: _create(*_connect(spec), name, tags, parent_run_id=None)
    )


def end_sweep(spec: TrackingSpec, run_id: str | None, status: str = "FINISHED") -> None:
    """Close the parent run (`status` FINISHED, FAILED or KILLED); without a run id do nothing."""
    if run_id is not None:
        _attempt(
            spec,
            f"end of sweep {run_id}",
            lambda: _connect(spec)[0].set_terminated(run_id, status),
        )


def _attempt(spec: TrackingSpec, what: str, send: Callable[[], T]) -> T | None:
    if not spec.enabled:
        return None
    try:
        return send()
    # MLflow lets errors of sqlalchemy, alembic, requests and the file system through; none of
    # them may cost the caller a result
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        log.warning("%s not logged to %s: %s: %s", what, spec.uri, type(error).__name__, reason)
        log.debug("tracking failed", exc_info=True)
        return None


def _connect(spec: TrackingSpec) -> "tuple[MlflowClient, str]":
    """Return a client and the id of the experiment, both created on first use."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with _set_up_lock(spec):
        client = MlflowClient(tracking_uri=spec.uri)
        found = client.get_experiment_by_name(spec.experiment)
        if found is not None:
            return client, found.experiment_id
        location = None if urlsplit(spec.uri).scheme.startswith("http") else spec.artifacts
        try:
            return client, client.create_experiment(spec.experiment, location)
        except MlflowException:  # on a server another process may have been first
            found = client.get_experiment_by_name(spec.experiment)
            if found is None:
                raise
            return client, found.experiment_id


def _set_up_lock(spec: TrackingSpec) -> "BaseFileLock | nullcontext[None]":
    """Return the lock without which two processes would create one sqlite database at once."""
    if spec.database is None:
        return nullcontext()
    spec.database.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{spec.database}.lock", timeout=LOCK_SECONDS)


def _create(
    client: "MlflowClient",
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    parent_run_id: str | None,
) -> str:
    parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
    run = client.create_run(experiment, tags={**tags, **parent}, run_name=name)
    return str(run.info.run_id)


def _log_values(
    client: "MlflowClient", run_id: str, result: Mapping[str, Any], axes: Mapping[str, Any]
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    metrics, tags = [], []
    results = {name: value for name, value in result.items() if name not in (*axes, "axes")}
    for name, value in _flat(results):
        if isinstance(value, int | float) and math.isfinite(value):
            metrics.append(Metric(name, float(value), now, 0))
        elif isinstance(value, int | float):
            tags.append(RunTag(f"nonfinite.{name}", str(value)))
        elif value is not None:
            tags.append(RunTag(name, str(value)))
    params = [Param(name, str(value)) for name, value in _flat(axes)]
    client.log_batch(run_id, metrics=metrics, params=params, tags=tags)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _log_files(
    client: "MlflowClient",
    run_id: str,
    per_site: "pd.DataFrame | None",
    figures: "Mapping[str, Figure | Path]",
    config_yaml: str,
) -> None:
    client.log_text(run_id, config_yaml, "config.yaml")
    if per_site is not None:
        client.log_table(run_id, per_site, "per_site.json")
    for name, figure in figures.items():
        if isinstance(figure, Path):
            client.log_artifact(run_id, figure, "figures")
        else:
            client.log_figure(run_id, figure, f"figures/{name}.png")
