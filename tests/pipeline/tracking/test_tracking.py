"""Tracking: everything logged comes back, in parallel too."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.run.specs import TrackingSpec
from pipeline.tracking import database
from pipeline.tracking.entries import dataset
from tests.pipeline.conftest import fork_server
from tests.pipeline.tracking.databases import (
    AXES,
    entry,
    fetch,
    log_run,
    log_three,
)


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


def test_nested_tags_are_joined_by_dots_and_absent_ones_left_out(spec):
    origin = {"git": {"revision": "0a", "dirty": False, "branch": None}, "version.torch": "2"}
    tags = fetch(spec, log_run(spec, tags=origin)).data.tags
    assert {
        "git.revision": "0a",
        "git.dirty": "False",
        "version.torch": "2",
    }.items() <= tags.items()
    assert "git.branch" not in tags


def test_a_run_has_the_times_of_its_computation_not_of_its_logging(spec):
    info = fetch(spec, log_run(spec)).info
    assert (info.start_time, info.end_time) == (1_700_000_000_500, 1_700_000_007_000)


def views(spec: TrackingSpec) -> dict[str, dict]:
    """The experiment's shared views by what the dashboard's address calls them."""
    db = database.connect(spec)
    start = "mlflow.sharedViewState."
    kept = {
        k.removeprefix(start): json.loads(v) for k, v in db.experiment.tags.items() if start in k
    }
    states = {key: json.loads(v["state"]) if "state" in v else v for key, v in kept.items()}
    return states


def shown(spec: TrackingSpec, key: str) -> set[str]:
    """The names of the runs that a view's search leaves."""
    db = database.connect(spec)
    runs = db.client.search_runs([db.experiment.experiment_id], views(spec)[key]["searchFilter"])
    return {str(run.info.run_name) for run in runs}


def test_every_model_has_charts_of_its_log_perplexities_against_energy(spec):
    tiny, odd = {"model": "tiny"}, {"model": "it's/odd"}
    log_run(spec, "first", result={"ppl_c4": 1e9, "nll_c4": 20.7, "nll_ptb": 1.0}, tags=tiny)
    log_run(spec, "other", result={"nll_c4": 2.0}, tags=odd)
    log_run(spec, "sweep", result={"jobs": 2}, tags={"model": "tiny, it's/odd"})
    log_run(spec, "later", result={"nll_wikipedia": 3.0, "nll_c4": 3.0}, tags=tiny)
    log_run(spec, "failed", result={}, tags=tiny, status="FAILED")
    found = views(spec)
    assert {*found} == {"energy", "energy-tiny", "energy-it_s_odd", "runs"}
    titles = ("tiny: log perplexity against energy", "runs with their numbers")
    tags = database.connect(spec).experiment.tags
    for key, title in zip(("energy-tiny", "runs"), titles, strict=True):  # as the menu has them
        assert json.loads(tags[f"mlflow.sharedViewState.{key}"])["name"] == title
    assert found["energy"] == found["energy-tiny"]  # of the model logged last
    charts = {
        key: [(c["xaxis"]["key"], c["yaxis"]["key"]) for c in view["compareRunCharts"]]
        for key, view in found.items()
        if key != "runs"
    }
    tiny_charts = [("energy_J", f"nll_{name}") for name in ("c4", "ptb", "wikipedia")]
    assert charts["energy-tiny"] == tiny_charts
    assert charts["energy-it_s_odd"] == [("energy_J", "nll_c4")]
    assert shown(spec, "energy-tiny") == {"first", "later"}
    assert shown(spec, "energy-it_s_odd") == {"other"}


def test_runs_are_listed_with_their_numbers(spec):
    log_run(spec, "first", result={"ppl_c4": 3.0, "nll_c4": 1.1}, tags={"model": "tiny"})
    log_run(spec, "second", result={"ppl_ptb": 3.0, "nll_ptb": 1.1}, tags={"model": "other"})
    view = views(spec)["runs"]
    numbers = ["ppl_c4", "ppl_ptb", "energy_J", "saving", "spikes_per_value", "nmse"]
    assert view["selectedColumns"] == [f"metrics.`{name}`" for name in numbers]
    assert "searchFilter" not in view  # so that failed runs and sweeps are among them
    log_run(spec, "third", result={"ppl_c4": 3.0, "nll_c4": 1.1}, tags={"model": "tiny"})
    assert views(spec)["runs"] == view


def test_a_view_of_an_earlier_version_keeps_its_charts(spec):
    db = database.connect(spec)
    earlier = json.dumps({"compareRunCharts": [{"uuid": "nll_ptb"}]})
    tag = "mlflow.sharedViewState.energy-tiny"
    db.client.set_experiment_tag(db.experiment.experiment_id, tag, earlier)
    log_run(spec, result={"nll_c4": 1.1}, tags={"model": "tiny"})
    charts = views(spec)["energy-tiny"]["compareRunCharts"]
    assert [chart["yaxis"]["key"] for chart in charts] == ["nll_ptb", "nll_c4"]


def test_a_job_that_was_computed_before_is_a_repeat(spec):
    """Whichever is logged first: what counts is when they ran."""
    names = ("third", "first", "second", "else", "failed")
    for name in names:
        computed = {"computation": "b" if name == "else" else "a", "model": "tiny"}
        start = 1_700_000_000.0 + 10 * ("failed", "first", "second", "third", "else").index(name)
        status = "FAILED" if name == "failed" else "FINISHED"
        log_run(spec, name, tags=computed, started=start, result={"nll_c4": 1}, status=status)
    db = database.connect(spec)
    runs = db.client.search_runs([db.experiment.experiment_id])
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
        dataset("c4", "calibration", 40 * "a", "hub", {"id": "allenai/c4"}),
        dataset("wikipedia", "evaluation", "b", "local", {"uri": "text.jsonl"}),
    ]
    inputs = fetch(spec, log_run(spec, inputs=texts)).inputs.dataset_inputs
    seen = {(i.tags[0].value, i.dataset.name, i.dataset.digest, i.dataset.source) for i in inputs}
    assert seen == {
        ("calibration", "c4", 36 * "a", '{"id": "allenai/c4"}'),
        ("evaluation", "wikipedia", "b", '{"uri": "text.jsonl"}'),
    }


def test_a_data_set_that_another_process_creates_first_costs_nothing(spec, monkeypatch):
    text = dataset("wikipedia", "evaluation", "b", "local", {"uri": "text.jsonl"})
    rival, log_inputs, refused = fetch(spec, log_run(spec)).info.run_id, MlflowClient.log_inputs, []

    def late(client, run_id, datasets):
        if not refused:  # MLflow has looked, the other process writes, MLflow writes too
            log_inputs(client, rival, datasets)
            refused.append(run_id)
            raise MlflowException("UNIQUE constraint failed: datasets.name, datasets.digest")
        log_inputs(client, run_id, datasets)

    monkeypatch.setattr(MlflowClient, "log_inputs", late)
    run = fetch(spec, log_run(spec, name="second", inputs=[text], identity={"job": "second"}))
    assert refused == [run.info.run_id] and run.info.status == "FINISHED"
    assert [i.dataset.digest for i in run.inputs.dataset_inputs] == ["b"]


def test_logging_a_run_again_leaves_one_of_it(spec, monkeypatch):
    """As after a server that died on the way: with half of it there, and with all of it there."""

    def broken(*args: object) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_stream", broken)
        assert log_run(spec) is None
    client = MlflowClient(tracking_uri=spec.uri)
    experiment = client.get_experiment_by_name(spec.experiment).experiment_id
    (half,) = client.search_runs([experiment])
    assert half.info.status == "RUNNING"
    database._lost.clear()
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
    table = per_site.to_json(orient="split").encode()
    texts = {"config.yaml": b"coding: gated\n", "per_site.json": table}
    drawn = b"\x89PNG\r\n"
    files = {"figures/drawn.png": drawn, "drawn.png": drawn}
    run_id = log_run(spec, artifacts=texts | files)
    client = MlflowClient(tracking_uri=spec.uri)
    logged = {file.path for file in client.list_artifacts(run_id, "figures")}
    assert logged == {"figures/drawn.png"}
    folder = Path(client.download_artifacts(run_id, "", str(tmp_path)))
    assert (folder / "config.yaml").read_text() == "coding: gated\n"
    assert (folder / "figures" / "drawn.png").read_bytes() == drawn
    assert (folder / "drawn.png").exists()
    pd.testing.assert_frame_equal(
        pd.read_json(folder / "per_site.json", orient="split"), per_site, check_dtype=False
    )
    assert run_id in fetch(spec, run_id).info.artifact_uri
    assert any(path.name == "per_site.json" for path in Path(spec.artifacts).rglob("*.json"))


def test_jobs_hang_below_their_sweep(spec):
    sweep = entry("sweep", status="FAILED")
    db = database.connect(spec)
    parent = db.create(sweep)
    assert fetch(spec, parent).info.status == "RUNNING"
    jobs = [log_run(spec, f"job{number}", parent) for number in range(2)]
    db.complete(parent, sweep)
    assert fetch(spec, parent).info.status == "FAILED"
    children = db.find({"mlflow.parentRunId": parent})
    assert {run.info.run_id for run in children} == set(jobs)


def test_a_run_says_of_which_process_it_is(spec):
    run = fetch(spec, log_run(spec))
    assert run.data.tags["process"] == f"{socket.gethostname()} {os.getpid()}"


def test_disabled_tracking_touches_nothing(cold, tmp_path):
    off = TrackingSpec(cold.uri, cold.experiment, cold.artifacts, enabled=False)
    assert log_run(off) is None
    assert not list(tmp_path.iterdir())


def test_parallel_processes_lose_nothing_on_a_cold_database(cold):
    with fork_server(log_three.__module__, "mlflow.store.tracking.sqlalchemy_store") as context:
        start = context.Barrier(4)  # they meet at the cold database
        jobs = [context.Process(target=log_three, args=(cold, i, start)) for i in range(4)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(120)
    assert [job.exitcode for job in jobs] == [0] * 4
    client = MlflowClient(tracking_uri=cold.uri)
    experiment = client.get_experiment_by_name(cold.experiment).experiment_id
    logged = {(r.info.run_name, r.data.metrics["ppl"]) for r in client.search_runs([experiment])}
    assert logged == {(f"{worker}.{n}", float(n)) for worker in range(4) for n in range(3)}


def test_what_the_user_has_set_stands(spec, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    log_run(spec)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"


@pytest.mark.slow
def test_importing_does_not_load_mlflow():
    code = "import sys, pipeline.tracking.tracked; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_first_use_prints_nothing(cold):
    """In a process that has not imported MLflow, with nothing set in the environment."""
    code = """import sys
from pipeline.run.specs import TrackingSpec
from pipeline.tracking.database import Entry, attempt
entry = Entry("run", {"job": "0"}, 0, 0, artifacts={"config.yaml": b""})
send = lambda db: db.complete(db.create(entry), entry)
sys.exit(attempt(TrackingSpec(*sys.argv[1:]), "run", send) is None)"""
    command = [sys.executable, "-c", code, cold.uri, cold.experiment, cold.artifacts]
    unset = {name: value for name, value in os.environ.items() if name[:7] != "MLFLOW_"}
    done = subprocess.run(command, env=unset, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
