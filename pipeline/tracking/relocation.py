"""A database that was moved with its artifacts: make MLflow look for them where they are.

MLflow keeps the place of every experiment's and run's artifacts as an absolute path, and has no
command that changes it.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

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
