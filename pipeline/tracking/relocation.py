"""A database that was moved with its artifacts: make MLflow look for them where they are.

MLflow keeps the place of every experiment's and run's artifacts as an absolute path, and has no
command that changes it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.run.specs import TrackingSpec
from stages.errors import InputError

if TYPE_CHECKING:
    from mlflow.entities import Experiment

log = logging.getLogger(__name__)


def relocate(spec: TrackingSpec, experiment: Experiment) -> None:
    """Point an experiment of a database at `spec.artifacts`, if its artifacts have come there.

    They have if that folder holds what its runs have logged, if any has, and the folder that MLflow
    knows is gone or, of a database that was copied, lies elsewhere than the database. A run keeps
    its place if only that has its artifacts. Raises InputError if neither place has any.
    """
    from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlRun
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session
    from sqlalchemy.pool import NullPool

    places = (experiment.artifact_location, spec.artifacts)
    if spec.database is None or not all(map(is_local_uri, places)):
        return
    stored, given = (Path(local_file_uri_to_path(place)).resolve() for place in places)
    beside = spec.database.resolve().parent
    copied = given.is_relative_to(beside) and not stored.is_relative_to(beside)
    if stored == given or (stored.is_dir() and not copied):
        return
    number = int(experiment.experiment_id)
    with Session(create_engine(spec.uri, poolclass=NullPool)) as session, session.begin():
        runs: list[Any] = session.query(SqlRun).filter_by(experiment_id=number).all()
        here = {run.run_uuid for run in runs if (given / run.run_uuid).is_dir()}
        if not here and any(run.end_time is not None for run in runs):
            if stored.is_dir():
                return
            raise InputError(
                f"the artifacts of experiment {experiment.name} were in {stored}, which is gone, and "
                f"are not in {given}: move them there, or give tracking.experiment=ANOTHER"
            )
        row: Any = session.get_one(SqlExperiment, number)
        row.artifact_location = str(given)
        left = [r for r in runs if r.run_uuid not in here and _there(r.artifact_uri)]
        for run in runs:
            if run not in left:
                run.artifact_uri = f"{given}/{run.run_uuid}/artifacts"
    log.info("the artifacts of %s are in %s, no longer in %s", experiment.name, given, stored)
    if left:
        kept = "%d runs of experiment %s keep their artifacts in %s"
        log.warning(kept, len(left), experiment.name, stored)


def _there(uri: str) -> bool:
    from mlflow.utils.file_utils import local_file_uri_to_path

    return Path(local_file_uri_to_path(uri)).is_dir()
