"""Runs that the tracking database calls RUNNING although no process logs them any more."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from pipeline.tracking.tracking import PROCESS, Database, find

if TYPE_CHECKING:
    from mlflow.entities import Run


def close(db: Database, local: bool) -> int:
    """Close the runs whose process is gone, as KILLED; how many they were.

    A run that does not say of which process it is counts as such in a `local` database only.
    """
    orphans = [run for run in find(db, {}, "RUNNING") if _orphaned(run, local)]
    for run in orphans:
        db.client.set_terminated(run.info.run_id, "KILLED")
    return len(orphans)


def _orphaned(run: Run, local: bool) -> bool:
    host, _, process = run.data.tags.get(PROCESS, "").partition(" ")
    if "sweep" not in run.data.tags:  # another program's
        return False
    return not _alive(int(process)) if host == socket.gethostname() else not host and local


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True
