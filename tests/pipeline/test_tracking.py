"""Tracking: everything logged comes back, in parallel too, and no fault of it reaches the run."""

import json
import logging
import os
import shutil
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

from pipeline import orphans, tracking
from pipeline.commands.cli import main
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


def views(spec: TrackingSpec) -> dict[str, dict]:
    """The experiment's shared views by what the dashboard's address calls them."""
    db = tracking.connect(spec)
    start = "mlflow.sharedViewState."
    return {k.removeprefix(start): json.loads(v) for k, v in db.tags.items() if start in k}


def shown(spec: TrackingSpec, key: str) -> set[str]:
    """The names of the runs that a view's search leaves."""
    db = tracking.connect(spec)
    runs = db.client.search_runs([db.experiment], views(spec)[key]["searchFilter"])
    return {str(run.info.run_name) for run in runs}


def test_every_model_has_charts_of_its_log_perplexities_against_energy(spec):
    tiny, odd = {"model": "tiny"}, {"model": "it's/odd"}
    log_run(spec, "first", result={"ppl_c4": 1e9, "nll_c4": 20.7, "nll_ptb": 1.0}, tags=tiny)
    log_run(spec, "other", result={"nll_c4": 2.0}, tags=odd)
    log_run(spec, "sweep", result={"jobs": 2}, tags={"model": "tiny, it's/odd"})
    log_run(spec, "later", result={"nll_wikipedia": 3.0, "nll_c4": 3.0}, tags=tiny)
    log_run(spec, "failed", result={}, tags=tiny, status="FAILED")
    found = views(spec)
    assert {*found} == {"energy", "energy-tiny", "energy-it_s_odd"}
    assert found["energy"] == found["energy-tiny"]  # of the model logged last
    charts = {
        key: [(c["xaxis"]["key"], c["yaxis"]["key"]) for c in view["compareRunCharts"]]
        for key, view in found.items()
    }
    tiny_charts = [("energy_J", f"nll_{name}") for name in ("c4", "ptb", "wikipedia")]
    assert charts["energy-tiny"] == tiny_charts
    assert charts["energy-it_s_odd"] == [("energy_J", "nll_c4")]
    assert shown(spec, "energy-tiny") == {"first", "later"}
    assert shown(spec, "energy-it_s_odd") == {"other"}


def test_a_job_that_was_computed_before_is_a_repeat(spec):
    """Whichever is logged first: what counts is when they ran."""
    names = ("third", "first", "second", "else", "failed")
    for name in names:
        computed = {"computation": "b" if name == "else" else "a", "model": "tiny"}
        start = 1_700_000_000.0 + 10 * ("failed", "first", "second", "third", "else").index(name)
        status = "FAILED" if name == "failed" else "FINISHED"
        log_run(spec, name, tags=computed, started=start, result={"nll_c4": 1}, status=status)
    db = tracking.connect(spec)
    runs = db.client.search_runs([db.experiment])
    kinds = {r.info.run_name: r.data.tags["kind"] for r in runs}
    assert kinds == {
        **dict.fromkeys(("first", "else", "failed"), "job"),
        **dict.fromkeys(("second", "third"), "repeat"),
    }
    assert shown(spec, "energy") == {"first", "else"}
    changed = {"computation": "c", "model": "tiny"}
    log_run(spec, "first", tags=changed, result={"nll_c4": 2})  # its folder has another result now
    assert shown(spec, "energy") == {"first", "second", "else"}


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
    tracking.connect(database(shared_folder, "any"))  # a new database takes seconds
    folder = tmp_path_factory.mktemp("logged")
    (folder / "mlflow").mkdir()
    shutil.copy(shared_folder / "mlflow/mlflow.db", folder / "mlflow")
    spec = database(folder, "test")
    assert log_run(spec, "early") and tracking.connect(replace(spec, experiment="empty"))
    return folder


def test_artifacts_move_with_their_database(logged, tmp_path):
    """Moved before the second run, and moved again before the third, with an empty experiment."""
    names = []
    for name in ("first", "second"):
        shutil.copytree(logged if not names else tmp_path / names[-1], tmp_path / name)
        if names:
            shutil.rmtree(tmp_path / names[-1])
        spec = database(tmp_path / name, "test")
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
    spec = database(shutil.copytree(logged, tmp_path / "copy"), "test")
    run = fetch(spec, log_run(spec, "late"))
    assert sorted(logged.rglob("*")) == before
    assert str(tmp_path / "copy") in run.info.artifact_uri
    assert artifacts(spec) == dict.fromkeys(["early", "late"], ["config.yaml"])
    assert artifacts(database(logged, "test")) == {"early": ["config.yaml"]}


def test_a_run_whose_artifacts_stayed_behind_keeps_their_place(logged, tmp_path, caplog):
    """As after a move with a version that went on writing to the old folder."""
    old = shutil.copytree(logged, tmp_path / "old")
    assert log_run(database(old, "test"), "second")
    shutil.copytree(old, tmp_path / "new")
    spec, late = database(tmp_path / "new", "test"), entry("late")
    client = MlflowClient(tracking_uri=spec.uri)
    experiment = client.get_experiment_by_name("test").experiment_id
    db = tracking.Database(client, experiment, {}, time.monotonic() + 60)
    tracking.complete(db, tracking.create(db, late), late)
    assert log_run(spec, "last")
    assert f"1 runs of experiment test keep their artifacts in {old}" in caplog.text
    every = ["early", "second", "late", "last"]
    assert artifacts(spec) == dict.fromkeys(every, ["config.yaml"])
    shutil.rmtree(old)
    assert artifacts(spec) == dict.fromkeys(every, ["config.yaml"]) | {"late": []}


def test_artifacts_that_did_not_come_along_are_one_clear_line(logged, tmp_path, caplog):
    first = shutil.copytree(logged, tmp_path / "first")
    assert log_run(database(first, "test"), "second")
    shutil.move(first, tmp_path / "moved")
    shutil.move(tmp_path / "moved/mlflow/artifacts", tmp_path / "lost")
    spec = database(tmp_path / "moved", "test")
    assert log_run(spec, "third") is None and not first.exists()
    (line,) = (r.getMessage() for r in caplog.records if r.name == "pipeline.tracking")
    assert f"{first}/mlflow/artifacts, which is gone" in line and spec.artifacts in line
    shutil.move(tmp_path / "lost", spec.artifacts)
    assert log_run(spec, "third")
    assert artifacts(spec) == dict.fromkeys(["early", "second", "third"], ["config.yaml"])


def test_one_database_of_two_folders_keeps_its_artifacts(logged, tmp_path):
    """Each names a folder of its own; what the database has is where they go."""
    spec = database(shutil.copytree(logged, tmp_path / "one"), "test")
    assert log_run(spec, "first")
    other = replace(spec, artifacts=str(tmp_path / "two/artifacts"))
    shutil.copytree(spec.artifacts, other.artifacts)
    assert log_run(other, "second") and log_run(spec, "third")
    every = dict.fromkeys(["early", "first", "second", "third"], ["config.yaml"])
    assert artifacts(spec) == every
    assert len(list(Path(other.artifacts).iterdir())) == 2


def test_relocate_needs_no_run(logged, tmp_path, capsys):
    spec = database(shutil.copytree(logged, tmp_path / "copy"), "test")
    given = [f"tracking.uri={spec.uri}", f"tracking.artifacts={spec.artifacts}"]
    assert main(["relocate", *given]) == 0 == main(["relocate", *given])
    experiments = MlflowClient(tracking_uri=spec.uri).search_experiments()
    places = {e.name: e.artifact_location for e in experiments if e.name in ("test", "empty")}
    assert places == dict.fromkeys(["test", "empty"], spec.artifacts)
    assert artifacts(spec) == {"early": ["config.yaml"]}
    nowhere = f"tracking.uri=sqlite:///{tmp_path}/nowhere/mlflow.db"
    assert main(["relocate", nowhere]) == 0 and not (tmp_path / "nowhere").exists()


def test_close_ends_the_runs_whose_process_is_gone(spec, tmp_path, capsys):
    db = tracking.connect(spec)
    here, dead = socket.gethostname(), 1 << 30
    ours = {"sweep": "s", "job": "0"}
    opened = {
        "dead": ours | {"process": f"{here} {dead}"},
        "sweep": {"kind": "sweep", "sweep": "s", "process": f"{here} {dead}"},
        "earlier": ours,  # a version that did not say of which process a run is
        "alive": ours | {"process": f"{here} {os.getpid()}"},
        "elsewhere": ours | {"process": f"{here}.other {dead}"},
        "foreign": {"process": f"{here} {dead}"},
    }
    for name, tags in opened.items():
        db.client.create_run(db.experiment, 0, tags, name)
    given = [f"tracking.uri={spec.uri}", f"tracking.experiment={spec.experiment}"]

    def status() -> dict[str | None, str]:
        runs = db.client.search_runs([db.experiment])
        return {run.info.run_name: run.info.status for run in runs}

    assert main(["sync", "--runs", str(tmp_path), *given]) == 0
    assert status() == dict.fromkeys(opened, "RUNNING")
    assert orphans.close(db, local=False) == 2
    db.client.update_run(*(r.info.run_id for r in tracking.find(db, {"kind": "sweep"})), "RUNNING")
    assert main(["sync", "--close", "--runs", str(tmp_path), *given]) == 0
    assert "2 runs closed whose process is gone" in capsys.readouterr().out
    killed = dict.fromkeys(["dead", "sweep", "earlier"], "KILLED")
    assert status() == killed | dict.fromkeys(["alive", "elsewhere", "foreign"], "RUNNING")


def test_a_run_says_of_which_process_it_is(spec):
    run = fetch(spec, log_run(spec))
    assert run.data.tags["process"] == f"{socket.gethostname()} {os.getpid()}"


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
    assert "run first not logged to http" in line and "python -m pipeline sync" in line
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
