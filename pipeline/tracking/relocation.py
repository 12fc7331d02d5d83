"""A database that has been moved with its artifacts: where MLflow looks for them, put right.

MLflow keeps the place of every experiment's and run's artifacts as an absolute path, and has no
command that changes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from sqlalchemy.orm import Session

    from pipeline.tracking.tracking import TrackingSpec

log = logging.getLogger(__name__)


def relocate(spec: TrackingSpec, experiment: Experiment) -> None:
    """Point an experiment of a database at `spec.artifacts`, if its artifacts have come there.

    They have if that folder holds what its runs have logged, if any has, and the folder that MLflow
    knows is gone or, of a database that was copied, lies elsewhere than the database. A run keeps
    its place if only that has its artifacts. Raises InputError if neither place has any.
    """
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    places = (experiment.artifact_location, spec.artifacts)
    if spec.database is None or not all(map(is_local_uri, places)):
        return
    stored, given = (Path(local_file_uri_to_path(place)).resolve() for place in places)
    if stored == given:
        return
    beside = spec.database.resolve().parent
    copied = given.is_relative_to(beside) and not stored.is_relative_to(beside)
    if stored.is_dir() and not copied:
        return
    runs = _ended(spec.uri, experiment.experiment_id)
    if not runs or any((given / run).is_dir() for run in runs):
        _rewrite(spec.uri, experiment.experiment_id, given)
    elif not stored.is_dir():
        raise InputError(
            f"the artifacts of experiment {experiment.name} were in {stored}, which is gone, and "
            f"are not in {given}: move them there, or give tracking.experiment=ANOTHER"
        )


@contextmanager
def _session(uri: str) -> Iterator[Session]:
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    engine = create_engine(uri)
    try:
        with Session(engine) as session, session.begin():
            yield session
    finally:
        engine.dispose()


def _ended(uri: str, experiment: str) -> list[str]:
    """The ids of the runs that have logged all of their artifacts."""
    from mlflow.store.tracking.dbmodels.models import SqlRun

    with _session(uri) as session:
        runs = session.query(SqlRun).filter_by(experiment_id=int(experiment))
        return [str(run.run_uuid) for run in runs if run.end_time is not None]


def _rewrite(uri: str, number: str, place: Path) -> None:
    """Make `place` the folder of an experiment's artifacts and of those of its runs."""
    from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlRun
    from mlflow.utils.file_utils import local_file_uri_to_path

    left = 0
    with _session(uri) as session:
        experiment: Any = session.get_one(SqlExperiment, int(number))
        name, stored = experiment.name, experiment.artifact_location
        experiment.artifact_location = str(place)
        run: Any
        for run in session.query(SqlRun).filter_by(experiment_id=int(number)):
            is_here = (place / run.run_uuid).is_dir()
            if is_here or not Path(local_file_uri_to_path(run.artifact_uri)).is_dir():
                run.artifact_uri = f"{place}/{run.run_uuid}/artifacts"
            else:
                left += 1
    log.info("the artifacts of experiment %s are in %s, no longer in %s", name, place, stored)
    if left:
        log.warning("%d runs of experiment %s keep their artifacts in %s", left, name, stored)
