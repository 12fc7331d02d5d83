"""Tracking: no fault of a server or an address reaches the run."""

import logging
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from omegaconf import OmegaConf

from pipeline.commands.cli import main
from pipeline.results.folders import RunFolder
from pipeline.run.specs import TrackingSpec
from pipeline.tracking import database, tracked
from pipeline.tracking.database import Database
from stages.errors import InputError
from tests.pipeline.tracking.databases import log_run


@pytest.fixture
def silent_server():
    """Listen on a port and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead_server() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("server", ["dead_server", "silent_server"])
def test_a_lost_server_is_one_warning_and_one_wait(server, request, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    spec = TrackingSpec(request.getfixturevalue(server), "test", "unused")
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking.database"):
        assert log_run(spec, "first") is None
        monkeypatch.setattr(database, "connect", lambda spec: pytest.fail("tried again"))
        assert [log_run(spec, str(number)) for number in range(50)] == [None] * 50
    (line,) = (r.getMessage() for r in caplog.records if r.name == "pipeline.tracking.database")
    assert "run first not logged to http" in line and "python -m pipeline sync" in line
    assert "\n" not in line and spec.uri in database._lost


def test_a_slow_database_costs_no_more_than_the_patience(spec, caplog, monkeypatch):
    """By a clock that goes on by 0.3 s with every request."""
    log_stream, sent = MlflowClient.log_stream, []

    def slow(*args, **named):
        sent.append(args)
        return log_stream(*args, **named)

    monkeypatch.setattr(MlflowClient, "log_stream", slow)
    monkeypatch.setattr(database, "monotonic", lambda: 0.3 * len(sent))
    texts = {f"{i}.txt": b"x" for i in range(40)}
    assert log_run(replace(spec, patience=1.0), artifacts=texts) is None
    assert len(sent) == 4  # the last of them begins after 0.9 s
    assert "too slow" in caplog.text and spec.uri in database._lost


def test_what_one_run_lacks_costs_no_other(spec, caplog):
    """An entry that cannot be made, and one that MLflow refuses."""

    def broken(db: Database) -> None:
        tracked.made(lambda job, draw: draw(job), RunFolder(Path("job")), lambda job: job.sites)

    assert database.attempt(spec, "run broken", broken) is None
    assert f"run broken not logged to {spec.uri}: FileNotFoundError" in caplog.text
    assert log_run(spec, "refused", params={"a\nb": 1}) is None
    assert "run refused not logged" in caplog.text and spec.uri not in database._lost
    client = MlflowClient(tracking_uri=spec.uri)
    experiment = client.get_experiment_by_name(spec.experiment).experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["FAILED"]
    assert log_run(spec) is not None


@pytest.mark.parametrize("uri", ["outputs/mlruns", "file:///tmp/mlruns", "", "ftp://host"])
def test_an_address_mlflow_cannot_use_is_one_clear_line(uri):
    with pytest.raises(InputError, match=r"sqlite:///FOLDER") as caught:
        TrackingSpec(uri, "test", "artifacts")
    assert "\n" not in str(caught.value)


def test_a_sqlite_address_without_a_file_is_refused():
    with pytest.raises(InputError, match="names no file"):
        TrackingSpec("sqlite://", "test", "artifacts")


def test_an_address_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv("DASHBOARD", "http://host:5000")
    given = {"uri": "${oc.env:DASHBOARD}", "experiment": "${model}", "artifacts": "unused"}
    config = OmegaConf.create({"model": "tiny", "tracking": given})
    spec = tracked.spec_of(config.tracking, patience=1.0)
    assert spec == TrackingSpec("http://host:5000", "tiny", "unused", patience=1.0)


@pytest.mark.parametrize(
    ("outcome", "status", "counted"),
    [
        ("result.json", 1, "1 could not be logged"),
        ("failed.json", 0, "1 have tracking.enabled=false"),
    ],
)
def test_a_job_whose_address_cannot_be_stops_no_sync(
    outcome, status, counted, tmp_path, caplog, capsys
):
    """A result is missing in the database; a job may have failed of that address."""
    (tmp_path / "run/.hydra").mkdir(parents=True)
    (tmp_path / "run/.hydra/config.yaml").write_text(
        "tracking: {uri: x, experiment: y, artifacts: z}"
    )
    (tmp_path / "run" / outcome).write_text('{"error": "none"}')
    assert main(["sync", "--runs", str(tmp_path)]) == status
    assert counted in capsys.readouterr().out and "tracking.uri=x names no file" in caplog.text
