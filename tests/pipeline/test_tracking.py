"""Tracking: everything logged comes back, in parallel too, and no fault of it reaches the run."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline import tracking
from pipeline.tracking import TrackingSpec
from stages.errors import InputError

RESULT = {
    "model": "tiny",
    "coding": "gated",
    "grains": 2,
    "ppl_wikipedia": 21.5,
    "ppl_c4": float("inf"),
    "acc_piqa": float("nan"),
    "nmse": None,
    "seconds": {"capture": 1.5},
    "hits": {"capture": True, "fitting": False},
    "keys": {"capture": "0123abcd"},
    "paper": {"energy_J": 2.5},
    "axes": {"timesteps": 6},
}
AXES = {"coding": "gated", "grains": 2, "timesteps": 6, "seed": 0, "sites": ["attn.in", "mlp.in"]}


def database(folder: Path, experiment: str) -> TrackingSpec:
    uri = f"sqlite:///{folder}/mlflow/mlflow.db"
    return TrackingSpec(uri, experiment, str(folder / "mlflow" / "artifacts"))


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture
def spec(shared_folder, request) -> TrackingSpec:
    """Give each test its experiment in one database, for a new database takes seconds."""
    return database(shared_folder, request.node.name)


@pytest.fixture
def cold(tmp_path) -> TrackingSpec:
    return database(tmp_path, "test")


def log_run(spec: TrackingSpec, name: str = "run", **changes) -> str | None:
    values = {
        "result": RESULT,
        "axes": AXES,
        "per_site": None,
        "figures": {},
        "config_yaml": "coding: gated\n",
        "tags": {"sweep": "s1"},
        "parent_run_id": None,
    }
    return tracking.log_run(spec, name=name, **(values | changes))


def fetch(spec: TrackingSpec, run_id: str | None) -> Run:
    assert run_id is not None
    return MlflowClient(tracking_uri=spec.uri).get_run(run_id)


def test_axes_metrics_and_tags_come_back(spec):
    run = fetch(spec, log_run(spec))
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in AXES.items()}
    assert run.data.metrics == {
        "ppl_wikipedia": 21.5,
        "seconds/capture": 1.5,
        "hits/capture": 1.0,
        "hits/fitting": 0.0,
        "paper/energy_J": 2.5,
    }
    assert run.data.tags["sweep"] == "s1"
    assert run.data.tags["keys/capture"] == "0123abcd"
    assert run.data.tags["model"] == "tiny"
    assert "coding" not in run.data.tags


def test_non_finite_numbers_are_tags_not_huge_metrics(spec):
    run = fetch(spec, log_run(spec))
    assert run.data.tags["nonfinite.ppl_c4"] == "inf"
    assert run.data.tags["nonfinite.acc_piqa"] == "nan"
    assert "nonfinite.nmse" not in run.data.tags
    assert all(value < 1e300 for value in run.data.metrics.values())


def test_table_figures_and_config_come_back(spec, tmp_path):
    per_site = pd.DataFrame({"site": ["a:in", "b:in"], "layer": [0, -1], "nmse": [1e-4, None]})
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    drawn = tmp_path / "drawn.png"
    figure.savefig(drawn)
    run_id = log_run(spec, per_site=per_site, figures={"error": figure, "density": drawn})
    client = MlflowClient(tracking_uri=spec.uri)
    logged = {file.path for file in client.list_artifacts(run_id, "figures")}
    assert logged == {"figures/error.png", "figures/drawn.png"}
    folder = Path(client.download_artifacts(run_id, "", str(tmp_path)))
    assert (folder / "config.yaml").read_text() == "coding: gated\n"
    assert (folder / "figures" / "error.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "figures" / "drawn.png").read_bytes() == drawn.read_bytes()
    pd.testing.assert_frame_equal(
        pd.read_json(folder / "per_site.json", orient="split"), per_site, check_dtype=False
    )
    assert run_id in fetch(spec, run_id).info.artifact_uri
    assert any(path.name == "per_site.json" for path in Path(spec.artifacts).rglob("*.json"))


def test_jobs_hang_below_their_sweep(spec):
    sweep = tracking.start_sweep(spec, "quickstart", {"kind": "sweep"})
    assert fetch(spec, sweep).info.status == "RUNNING"
    jobs = [log_run(spec, f"job{number}", parent_run_id=sweep) for number in range(2)]
    tracking.end_sweep(spec, sweep, "FAILED")
    assert fetch(spec, sweep).info.status == "FAILED"
    client = MlflowClient(tracking_uri=spec.uri)
    experiment = client.get_experiment_by_name(spec.experiment).experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{sweep}'")
    assert {run.info.run_id for run in children} == set(jobs)


def test_disabled_tracking_touches_nothing(cold, tmp_path):
    off = TrackingSpec(cold.uri, cold.experiment, cold.artifacts, enabled=False)
    assert tracking.start_sweep(off, "quickstart", {}) is None
    assert log_run(off) is None
    tracking.end_sweep(off, None)
    assert not list(tmp_path.iterdir())


JOB = """
import sys
from pipeline.tracking import TrackingSpec, log_run
uri, artifacts, worker = sys.argv[1:]
spec = TrackingSpec(uri, "test", artifacts)
sys.stdin.readline()
for number in range(3):
    assert log_run(
        spec, name=f"{worker}.{number}", result={"ppl": number}, axes={"worker": worker},
        per_site=None, figures={}, config_yaml="", tags={}, parent_run_id=None,
    )
"""


def test_parallel_processes_lose_nothing_on_a_cold_database(cold):
    command = [sys.executable, "-c", JOB, cold.uri, cold.artifacts]
    jobs = [
        subprocess.Popen(
            [*command, str(worker)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for worker in range(4)
    ]
    for job in jobs:  # all wait for this, so that they meet at the cold database
        job.stdin.write("go\n")
        job.stdin.flush()
    errors = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, errors
    client = MlflowClient(tracking_uri=cold.uri)
    experiment = client.get_experiment_by_name(cold.experiment).experiment_id
    logged = {(r.info.run_name, r.data.metrics["ppl"]) for r in client.search_runs([experiment])}
    assert logged == {(f"{worker}.{n}", float(n)) for worker in range(4) for n in range(3)}


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
def test_a_lost_server_is_one_warning_each(server, request, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    spec = TrackingSpec(request.getfixturevalue(server), "test", "unused")
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
        assert tracking.start_sweep(spec, "quickstart", {}) is None
        assert log_run(spec) is None
    ours = [record.getMessage() for record in caplog.records if record.name == "pipeline.tracking"]
    assert len(ours) == 2
    assert "sweep quickstart not logged" in ours[0] and "run run not logged" in ours[1]
    assert not any("\n" in line for line in ours)


def test_a_failure_half_way_is_a_warning_and_a_failed_run(spec, caplog, tmp_path):
    assert log_run(spec, figures={"lost": tmp_path / "nowhere.png"}) is None
    assert "run run not logged" in caplog.text
    client = MlflowClient(tracking_uri=spec.uri)
    experiment = client.get_experiment_by_name(spec.experiment).experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["FAILED"]


@pytest.mark.parametrize("uri", ["outputs/mlruns", "file:///tmp/mlruns", "", "ftp://host"])
def test_an_address_mlflow_cannot_use_is_one_clear_line(uri):
    with pytest.raises(InputError, match=r"sqlite:///FOLDER") as caught:
        TrackingSpec(uri, "test", "artifacts")
    assert "\n" not in str(caught.value)


def test_a_sqlite_address_without_a_file_is_refused():
    with pytest.raises(InputError, match="names no file"):
        TrackingSpec("sqlite://", "test", "artifacts")


def test_what_the_user_has_set_stands(spec, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    log_run(spec)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"


def test_importing_does_not_load_mlflow():
    code = "import sys, pipeline.tracking; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_first_use_prints_nothing(cold):
    code = JOB.replace("sys.stdin.readline()", "")
    command = [sys.executable, "-c", code, cold.uri, cold.artifacts, "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
