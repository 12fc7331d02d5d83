"""Databases of tests: runs that are logged to them and read back."""

from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.run.specs import TrackingSpec
from pipeline.tracking import database
from pipeline.tracking.database import Entry

RESULT = {
    "model": "tiny",
    "ppl_wikipedia": 21.5,
    "ppl_c4": float("inf"),
    "acc_piqa": float("nan"),
    "nmse": None,
    "seconds": {"capture": 1.5},
    "hits": {"capture": True, "fitting": False},
    "keys": {"capture": "0123abcd"},
    "paper": {"energy_J": 2.5},
}
AXES = {"coding": "gated", "grains": 2, "timesteps": 6, "seed": 0, "sites": ["attn.in", "mlp.in"]}


def local(folder: Path, experiment: str) -> TrackingSpec:
    uri = f"sqlite:///{folder}/mlflow/mlflow.db"
    return TrackingSpec(uri, experiment, str(folder / "mlflow" / "artifacts"))


def entry(name: str = "run", **changes) -> Entry:
    values = {
        "identity": {"sweep": "s1", "job": name},
        "started": 1_700_000_000.5,
        "ended": 1_700_000_007.0,
        "params": AXES,
        "result": RESULT,
        "artifacts": {"config.yaml": b"coding: gated\n"},
    }
    return Entry(name, **(values | changes))


def log_run(
    spec: TrackingSpec, name: str = "run", parent: str | None = None, **changes
) -> str | None:
    def send(db):
        made = entry(name, **changes)
        return db.complete(db.create(made, parent), made)

    return database.attempt(spec, f"run {name}", send)


def log_three(spec: TrackingSpec, worker: int, start: Any = None) -> None:
    """Logs three runs; with a barrier once all other processes have come to it too."""
    if start is not None:
        start.wait(120)
    for number in range(3):
        name = f"{worker}.{number}"
        files = {"config.yaml": b""}
        made = Entry(name, {"job": name}, 0, 0, result={"ppl": number}, artifacts=files)
        assert database.attempt(
            spec, name, lambda db, made=made: db.complete(db.create(made), made)
        )


def fetch(spec: TrackingSpec, run_id: str | None) -> Run:
    assert run_id is not None
    return MlflowClient(tracking_uri=spec.uri).get_run(run_id)
