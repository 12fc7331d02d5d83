"""Tracking: artifacts are where their database is, and runs whose process is gone are closed."""

import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.commands.cli import main
from pipeline.run.specs import TrackingSpec
from pipeline.tracking import database
from tests.pipeline.tracking.databases import (
    entry,
    fetch,
    local,
    log_run,
)


def artifacts(spec: TrackingSpec) -> dict[str, list[str]]:
    """Names of the artifacts of every run, as a client that knows nothing of us lists them."""
    client = MlflowClient(tracking_uri=spec.uri)
    experiment = client.get_experiment_by_name(spec.experiment)
    runs = client.search_runs([experiment.experiment_id])
    return {
        run.info.run_name: [file.path for file in client.list_artifacts(run.info.run_id)]
        for run in runs
    }


@pytest.fixture(scope="module")
def logged(shared_folder, tmp_path_factory) -> Path:
    """A folder with a database, an experiment of one run and one of none; to be copied."""
    database.connect(local(shared_folder, "any"))  # a new database takes seconds
    folder = tmp_path_factory.mktemp("logged")
    (folder / "mlflow").mkdir()
    shutil.copy(shared_folder / "mlflow/mlflow.db", folder / "mlflow")
    spec = local(folder, "test")
    assert log_run(spec, "early") and database.connect(replace(spec, experiment="empty"))
    return folder


def test_artifacts_move_with_their_database(logged, tmp_path):
    """Moved before the second run, and moved again before the third, with an empty experiment."""
    names = []
    for name in ("first", "second"):
        shutil.copytree(logged if not names else tmp_path / names[-1], tmp_path / name)
        if names:
            shutil.rmtree(tmp_path / names[-1])
        spec = local(tmp_path / name, "test")
        assert log_run(spec, name) and log_run(replace(spec, experiment="empty"), name)
        names.append(name)
        assert artifacts(spec) == dict.fromkeys(["early", *names], ["config.yaml"])
        here = list(Path(spec.artifacts).glob("*/artifacts/config.yaml"))
        assert len(here) == 1 + 2 * len(names)
    assert not (tmp_path / "first").exists()
    assert artifacts(replace(spec, experiment="empty")) == {
        "first": ["config.yaml"],
        "second": ["config.yaml"],
    }


def test_a_copied_database_leaves_the_artifacts_of_the_first_alone(logged, tmp_path):
    before = sorted(logged.rglob("*"))
    spec = local(shutil.copytree(logged, tmp_path / "copy"), "test")
    run = fetch(spec, log_run(spec, "late"))
    assert sorted(logged.rglob("*")) == before
    assert str(tmp_path / "copy") in run.info.artifact_uri
    assert artifacts(spec) == dict.fromkeys(["early", "late"], ["config.yaml"])
    assert artifacts(local(logged, "test")) == {"early": ["config.yaml"]}


def test_a_run_whose_artifacts_stayed_behind_keeps_their_place(logged, tmp_path, caplog):
    """As after a move with a version that went on writing to the old folder."""
    old = shutil.copytree(logged, tmp_path / "old")
    assert log_run(local(old, "test"), "second")
    shutil.copytree(old, tmp_path / "new")
    spec, late = local(tmp_path / "new", "test"), entry("late")
    client = MlflowClient(tracking_uri=spec.uri)
    experiment = client.get_experiment_by_name("test")
    db = database.Database(spec, client, experiment)
    db.complete(db.create(late), late)
    assert log_run(spec, "last")
    assert f"1 runs of experiment test keep their artifacts in {old}" in caplog.text
    every = ["early", "second", "late", "last"]
    assert artifacts(spec) == dict.fromkeys(every, ["config.yaml"])
    shutil.rmtree(old)
    assert artifacts(spec) == dict.fromkeys(every, ["config.yaml"]) | {"late": []}


def test_artifacts_that_did_not_come_along_are_one_clear_line(logged, tmp_path, caplog):
    first = shutil.copytree(logged, tmp_path / "first")
    assert log_run(local(first, "test"), "second")
    shutil.move(first, tmp_path / "moved")
    shutil.move(tmp_path / "moved/mlflow/artifacts", tmp_path / "lost")
    spec = local(tmp_path / "moved", "test")
    assert log_run(spec, "third") is None and not first.exists()
    (line,) = (r.getMessage() for r in caplog.records if r.name == "pipeline.tracking.database")
    assert f"{first}/mlflow/artifacts, which is gone" in line and spec.artifacts in line
    shutil.move(tmp_path / "lost", spec.artifacts)
    assert log_run(spec, "third")
    assert artifacts(spec) == dict.fromkeys(["early", "second", "third"], ["config.yaml"])


def test_one_database_of_two_folders_keeps_its_artifacts(logged, tmp_path):
    """Each names a folder of its own; what the database has is where they go."""
    spec = local(shutil.copytree(logged, tmp_path / "one"), "test")
    assert log_run(spec, "first")
    other = replace(spec, artifacts=str(tmp_path / "two/artifacts"))
    shutil.copytree(spec.artifacts, other.artifacts)
    assert log_run(other, "second") and log_run(spec, "third")
    every = dict.fromkeys(["early", "first", "second", "third"], ["config.yaml"])
    assert artifacts(spec) == every
    assert len(list(Path(other.artifacts).iterdir())) == 2


def test_relocate_needs_no_run(logged, tmp_path, capsys):
    spec = local(shutil.copytree(logged, tmp_path / "copy"), "test")
    given = [f"tracking.uri={spec.uri}", f"tracking.artifacts={spec.artifacts}"]
    assert main(["relocate", *given]) == 0 == main(["relocate", *given])
    experiments = MlflowClient(tracking_uri=spec.uri).search_experiments()
    places = {e.name: e.artifact_location for e in experiments if e.name in ("test", "empty")}
    assert places == dict.fromkeys(["test", "empty"], spec.artifacts)
    assert artifacts(spec) == {"early": ["config.yaml"]}
    nowhere = f"tracking.uri=sqlite:///{tmp_path}/nowhere/mlflow.db"
    assert main(["relocate", nowhere]) == 0 and not (tmp_path / "nowhere").exists()


def test_close_ends_the_runs_whose_process_is_gone(spec, tmp_path, capsys):
    db = database.connect(spec)
    here, dead = socket.gethostname(), 1 << 30
    ours = {"sweep": "s", "job": "0"}
    opened = {
        "dead": ours | {"process": f"{here} {dead}"},
        "sweep": {"kind": "sweep", "sweep": "s", "process": f"{here} {dead}"},
        "earlier": ours,  # a version that did not say of which process a run is
        "reused": ours | {"process": f"{here} {os.getpid()}"},  # a number that was another's
        "alive": ours | {"process": f"{here} {os.getpid()}"},
        "elsewhere": ours | {"process": f"{here}.other {dead}"},
        "foreign": {"process": f"{here} {dead}"},
    }
    for name, tags in opened.items():
        start = 1 if name == "reused" else round(1000 * time.time())
        db.client.create_run(db.experiment.experiment_id, start, tags, name)
    fields = ("uri", "experiment", "artifacts")
    given = [f"tracking.{name}={getattr(spec, name)}" for name in fields]

    def status() -> dict[str | None, str]:
        runs = db.client.search_runs([db.experiment.experiment_id])
        return {run.info.run_name: run.info.status for run in runs}

    assert main(["sync", "--runs", str(tmp_path), *given]) == 0
    assert status() == dict.fromkeys(opened, "RUNNING")
    server = replace(db, spec=replace(spec, uri="http://127.0.0.1:1"))
    assert server.close_orphans() == 3
    db.client.update_run(*(r.info.run_id for r in db.find({"kind": "sweep"})), "RUNNING")
    assert main(["sync", "--close", "--runs", str(tmp_path), *given]) == 0
    assert "2 runs closed whose process is gone" in capsys.readouterr().out
    killed = dict.fromkeys(["dead", "sweep", "reused", "earlier"], "KILLED")
    assert status() == killed | dict.fromkeys(["alive", "elsewhere", "foreign"], "RUNNING")
