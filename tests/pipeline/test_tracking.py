"""Tracking: everything logged comes back, in parallel too, and no fault of it reaches the run."""

import json
import logging
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pipeline import tracking
from pipeline.entry import Entry, Text
from pipeline.tracking import TrackingSpec
from stages.errors import InputError

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


@pytest.fixture(autouse=True)
def nothing_lost(monkeypatch):
    """What a process remembers of servers that failed is not for the next test."""
    monkeypatch.setattr(tracking, "_lost", set())


def entry(name: str = "run", **changes) -> Entry:
    values = {
        "identity": {"sweep": "s1", "job": name},
        "started": 1_700_000_000.5,
        "ended": 1_700_000_007.0,
        "params": AXES,
        "result": RESULT,
        "documents": {"config.yaml": "coding: gated\n"},
    }
    return Entry(name, **(values | changes))


def log_run(
    spec: TrackingSpec, name: str = "run", parent: str | None = None, **changes
) -> str | None:
    def send(db, what):
        run_id = tracking.create(db, what, parent)
        tracking.complete(db, run_id, what)
        return run_id

    return tracking.attempt(spec, f"run {name}", lambda: entry(name, **changes), send)


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


def test_a_run_has_the_times_of_its_computation_not_of_its_logging(spec):
    info = fetch(spec, log_run(spec)).info
    assert (info.start_time, info.end_time) == (1_700_000_000_500, 1_700_000_007_000)


def test_the_experiment_has_a_chart_of_every_perplexity_against_energy(spec):
    assert log_run(spec) and log_run(spec, "other", result={"ppl_c4": 1.0, "ppl_ptb": 2.0})
    db = tracking.connect(spec)
    state = json.loads(
        db.client.get_experiment(db.experiment).tags["mlflow.sharedViewState.energy"]
    )
    charts = [(c["xaxis"]["key"], c["yaxis"]["key"]) for c in state["compareRunCharts"]]
    names = ["wikipedia", "c4", "ptb"]
    assert charts == [("energy_J", f"{y}_{name}") for name in names for y in ("ppl", "nll")]


def test_more_params_and_tags_than_one_request_can_hold(spec):
    many = {f"name{i}": str(i) for i in range(230)}
    run = fetch(spec, log_run(spec, params=many, tags=many, result={}))
    assert run.data.params == many and many.items() <= run.data.tags.items()


def test_texts_are_inputs_with_their_context_and_source(spec):
    texts = [
        Text("c4", 40 * "a", "calibration", "hub", {"id": "allenai/c4"}, {"windows": 16}),
        Text("wikipedia", "b", "evaluation", "local", {"uri": "text.jsonl"}, {"windows": 3}),
    ]
    inputs = fetch(spec, log_run(spec, data=texts)).inputs.dataset_inputs
    seen = {(i.tags[0].value, i.dataset.name, i.dataset.digest, i.dataset.source) for i in inputs}
    assert seen == {
        ("calibration", "c4", 36 * "a", '{"id": "allenai/c4"}'),
        ("evaluation", "wikipedia", "b", '{"uri": "text.jsonl"}'),
    }


def test_a_data_set_that_another_process_creates_first_costs_nothing(spec, monkeypatch):
    text = Text("wikipedia", "b", "evaluation", "local", {"uri": "text.jsonl"}, {"windows": 3})
    rival, log_inputs, refused = fetch(spec, log_run(spec)).info.run_id, MlflowClient.log_inputs, []

    def late(client, run_id, datasets):
        if not refused:  # MLflow has looked, the other process writes, MLflow writes too
            log_inputs(client, rival, datasets)
            refused.append(run_id)
            raise MlflowException("UNIQUE constraint failed: datasets.name, datasets.digest")
        log_inputs(client, run_id, datasets)

    monkeypatch.setattr(MlflowClient, "log_inputs", late)
    run = fetch(spec, log_run(spec, name="second", data=[text], identity={"job": "second"}))
    assert refused == [run.info.run_id] and run.info.status == "FINISHED"
    assert [i.dataset.digest for i in run.inputs.dataset_inputs] == ["b"]


def test_logging_a_run_again_leaves_one_of_it(spec, monkeypatch):
    """As after a server that died on the way: with half of it there, and with all of it there."""

    def broken(*args: object) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_text", broken)
        assert log_run(spec) is None
    client = MlflowClient(tracking_uri=spec.uri)
    experiment = client.get_experiment_by_name(spec.experiment).experiment_id
    (half,) = client.search_runs([experiment])
    assert half.info.status == "RUNNING"
    tracking._lost.clear()
    other = log_run(spec, "other")
    whole, again = log_run(spec), log_run(spec)
    assert {run.info.run_id for run in client.search_runs([experiment])} == {other, again}
    assert whole != again and fetch(spec, again).info.status == "FINISHED"


def test_non_finite_numbers_are_tags_not_huge_metrics(spec):
    run = fetch(spec, log_run(spec))
    assert run.data.tags["nonfinite.ppl_c4"] == "inf"
    assert run.data.tags["nonfinite.acc_piqa"] == "nan"
    assert "nonfinite.nmse" not in run.data.tags
    assert all(value < 1e300 for value in run.data.metrics.values())


def test_table_figures_and_config_come_back(spec, tmp_path):
    per_site = pd.DataFrame({"site": ["a:in", "b:in"], "layer": [0, -1], "nmse": [1e-4, None]})
    drawn = tmp_path / "drawn.png"
    drawn.write_bytes(b"\x89PNG")
    files = {"figures": [drawn], "": [drawn]}
    run_id = log_run(spec, tables={"per_site.json": per_site}, files=files)
    client = MlflowClient(tracking_uri=spec.uri)
    logged = {file.path for file in client.list_artifacts(run_id, "figures")}
    assert logged == {"figures/drawn.png"}
    folder = Path(client.download_artifacts(run_id, "", str(tmp_path)))
    assert (folder / "config.yaml").read_text() == "coding: gated\n"
    assert (folder / "figures" / "drawn.png").read_bytes() == drawn.read_bytes()
    assert (folder / "drawn.png").exists()
    pd.testing.assert_frame_equal(
        pd.read_json(folder / "per_site.json", orient="split"), per_site, check_dtype=False
    )
    assert run_id in fetch(spec, run_id).info.artifact_uri
    assert any(path.name == "per_site.json" for path in Path(spec.artifacts).rglob("*.json"))


def test_jobs_hang_below_their_sweep(spec):
    sweep = entry("sweep", status="FAILED")
    db = tracking.connect(spec)
    parent = tracking.create(db, sweep)
    assert fetch(spec, parent).info.status == "RUNNING"
    jobs = [log_run(spec, f"job{number}", parent) for number in range(2)]
    tracking.complete(db, parent, sweep)
    assert fetch(spec, parent).info.status == "FAILED"
    children = db.client.search_runs([db.experiment], f"tags.mlflow.parentRunId = '{parent}'")
    assert {run.info.run_id for run in children} == set(jobs)


def test_disabled_tracking_touches_nothing(cold, tmp_path):
    off = TrackingSpec(cold.uri, cold.experiment, cold.artifacts, enabled=False)
    assert log_run(off) is None
    assert not list(tmp_path.iterdir())


JOB = """
import sys
from pipeline.entry import Entry
from pipeline.tracking import TrackingSpec, attempt, complete, create
uri, artifacts, worker = sys.argv[1:]

def send(db, entry):
    run_id = create(db, entry)
    complete(db, run_id, entry)
    return run_id

spec = TrackingSpec(uri, "test", artifacts)
sys.stdin.readline()
for number in range(3):
    name = f"{worker}.{number}"
    entry = Entry(name, {"job": name}, 0, 0, result={"ppl": number}, documents={"config.yaml": ""})
    assert attempt(spec, name, lambda: entry, send)
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
def test_a_lost_server_is_one_warning_and_one_wait(server, request, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    spec = TrackingSpec(request.getfixturevalue(server), "test", "unused")
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
        assert log_run(spec, "first") is None
        start = time.monotonic()
        assert [log_run(spec, str(number)) for number in range(50)] == [None] * 50
        assert time.monotonic() - start < 0.5
    (line,) = (r.getMessage() for r in caplog.records if r.name == "pipeline.tracking")
    assert "run first not logged to http" in line and "pipeline.tracking sync" in line
    assert "\n" not in line and tracking.lost(spec)


def test_a_slow_database_costs_no_more_than_the_patience(spec, caplog, monkeypatch):
    log_batch = MlflowClient.log_batch

    def slow(*args, **named):
        time.sleep(0.3)
        return log_batch(*args, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    tags = {f"name{i}": "x" for i in range(2000)}  # forty requests
    start = time.monotonic()
    assert log_run(replace(spec, patience=1.0), tags=tags) is None
    assert time.monotonic() - start < 5
    assert "too slow" in caplog.text and tracking.lost(spec)


def test_what_one_run_lacks_costs_no_other(spec, caplog):
    """An entry that cannot be made, and one that MLflow refuses."""

    def broken() -> Entry:
        raise FileNotFoundError("per_site.parquet")

    assert tracking.attempt(spec, "run broken", broken, lambda db, what: "never") is None
    assert "run broken not logged: FileNotFoundError" in caplog.text
    assert log_run(spec, "refused", params={"a\nb": 1}) is None
    assert "run refused not logged" in caplog.text and not tracking.lost(spec)
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
