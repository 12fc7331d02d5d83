"""Sweeps logged to a real `mlflow server`, also one that dies, hangs or comes back."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import chdir
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock
from mlflow import MlflowClient

from pipeline.commands.cli import main
from pipeline.results.folders import RunFolder
from pipeline.run import runner
from pipeline.run.specs import TrackingSpec
from pipeline.tracking import database, tracked
from tests.pipeline.conftest import REPOSITORY
from tests.pipeline.tracking.servers import (
    AXES,
    EXPERIMENT,
    SWEEP,
    busy_machine,
    folder,
    server,
    sweep,
    to,
)

pytestmark = pytest.mark.slow

__all__ = ["busy_machine", "folder", "server", "sweep"]  # fixtures


def test_a_sweep_arrives_as_a_parent_with_its_jobs(server, sweep):
    assert sweep.code == 0, sweep.err
    parent, children = server.runs(sweep.runs)
    assert sorted(children) == ["0", "1"]
    for job, result in zip(("0", "1"), sweep.results, strict=True):
        run = children[job]
        assert run.info.status == "FINISHED" and run.data.tags["kind"] == "job"
        assert run.info.run_name == f"{result['label']} {sweep.runs.name[-6:]}/{job} tiny"
        assert set(run.data.params) > AXES
        assert run.data.params["coding"] == result["coding"]
        assert run.data.params["coding.timesteps"] == run.data.params["timesteps"] == "6"
        assert run.data.params["sites"] == "all" and run.data.params["evaluation"] == "wikipedia"
        for name in ("ppl_wikipedia", "nmse", "energy_J", "saving", "spikes_per_value"):
            assert run.data.metrics[name] == result[name]
        assert run.data.metrics["seconds/fitting"] == result["seconds"]["fitting"]
        tags = {"coding", "transform", "experiment", "overrides", "version.torch", "git.dirty"}
        assert tags - {"git.dirty"} < set(run.data.tags)
        assert run.info.start_time == round(1000 * result["run"]["started"])
        assert run.info.end_time == round(1000 * result["run"]["ended"]) > run.info.start_time
    assert parent.info.status == "FINISHED" and parent.data.tags["coding"] == "las, gated"
    assert parent.info.run_name == f"sweep {sweep.runs.name[-6:]} tiny"
    assert parent.data.metrics == {"jobs": 2, "failed": 0}
    assert "| gated" in parent.data.tags["mlflow.note.content"]


def test_tables_figures_and_configuration_arrive(server, sweep, tmp_path):
    parent, children = server.runs(sweep.runs)
    run = children["1"]
    files = Path(server.client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    sites = pd.read_json(files / "per_site.json", orient="split")
    local = pd.read_parquet(sweep.runs / "1/per_site.parquet")
    pd.testing.assert_frame_equal(sites, local, check_dtype=False)
    assert "timesteps: 6" in (files / "config.yaml").read_text()
    pictures = {path.stem for path in (files / "figures").iterdir()}
    assert pictures == {"density_and_levels", "error_per_layer", "spike_rate_per_layer"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (files / "figures").iterdir())
    whole = Path(server.client.download_artifacts(parent.info.run_id, "", str(tmp_path / "..")))
    table = whole / "tables" / sweep.table.name
    assert table.read_bytes() == (sweep.cwd / "outputs/tables" / table.name).read_bytes()
    logged = pd.read_json(whole / "table.json", orient="split")
    assert list(logged["coding"]) == ["las", "gated"]
    assert (whole / "figures" / f"{sweep.table.stem}_ppl_energy.png").exists()


def test_data_sets_are_named_by_the_tokens_that_were_read(server, sweep):
    _, children = server.runs(sweep.runs)
    inputs = children["1"].inputs.dataset_inputs
    assert len(inputs) == 2
    for given in inputs:
        tokens = sweep.cwd / "outputs/store/tokens" / given.dataset.digest / "manifest.json"
        context = given.tags[0].value
        assert json.loads(tokens.read_text())["spec"]["purpose"] == context
        file = json.loads(given.dataset.source)["uri"]
        assert Path(file).name == f"{context}.jsonl" and given.dataset.name == "wikipedia"


def synced(runs: Path, *arguments: str) -> int:
    database._lost.clear()  # as a new process
    with chdir(runs.parents[1]):
        return main(["sync", "--runs", str(runs), *arguments])


def test_a_server_killed_in_mid_sweep_costs_nothing(
    command, server, folder, sweep, monkeypatch, capsys, tmp_path
):
    """Job 0 is logged, the server dies with half of job 1, jobs 2 and 3 find none."""
    log_stream, dying = MlflowClient.log_stream, []

    def dies(self: MlflowClient, run_id: str, content: BytesIO, name: str) -> None:
        if name == "config.yaml":
            dying.append(run_id)
            if len(dying) == 2:
                server.kill()
        log_stream(self, run_id, content, name)

    grid = (*SWEEP[:-1], "coding.timesteps=4,6")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_stream", dies)
        done = command(folder, *grid, *to(server.uri))
    assert done.code == 0 and len(done.results) == 4
    assert len(dying) == 2  # the others were not even tried
    (line,) = (line for line in done.out.splitlines() if "WARNING" in line)
    assert f"run {done.runs.name}/1 not logged" in line and "python -m pipeline sync" in line

    server.start()
    parent, children = server.runs(done.runs)
    assert {job: r.info.status for job, r in children.items()} == {"0": "FINISHED", "1": "RUNNING"}
    shutil.copytree(done.runs, tmp_path / "runs" / done.runs.name)  # without the other tests' runs
    runs = folder / "outputs" / "killed"
    (tmp_path / "runs").rename(runs)
    capsys.readouterr()
    assert synced(runs) == 0
    assert "3 runs logged, 1 were logged before" in capsys.readouterr().out
    again, children = server.runs(done.runs)
    assert again.info.run_id == parent.info.run_id and again.info.status == "FINISHED"
    assert again.data.metrics == {"jobs": 4, "failed": 0}
    assert {job: r.info.status for job, r in children.items()} == dict.fromkeys("0123", "FINISHED")
    for job, result in enumerate(done.results):
        assert children[str(job)].data.metrics["energy_J"] == result["energy_J"]

    command_line = [sys.executable, "-m", "pipeline", "sync", "--runs", str(runs)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    twice = subprocess.run(
        command_line, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert twice.returncode == 0, twice.stderr
    assert twice.stdout.startswith("0 runs logged, 4 were logged before")
    last, same = server.runs(done.runs)
    ids = [run.info.run_id for run in (again, *children.values())]
    assert sorted(ids) == sorted(run.info.run_id for run in (last, *same.values()))
    table = server.client.download_artifacts(last.info.run_id, "table.json", str(tmp_path))
    assert len(pd.read_json(table, orient="split")) == 4


def test_a_sweep_that_was_killed_is_logged_and_closed_on_demand(server, folder, sweep, capsys):
    runs = folder / "outputs" / "interrupted"
    copy = runs / "interrupted"
    shutil.copytree(sweep.runs, copy)
    for name in ("ended.json", "1/result.json"):
        for path in copy.glob(name):
            path.unlink()
    assert synced(runs) == 0
    assert "has not ended" in capsys.readouterr().out
    parent, children = server.runs(copy)
    assert parent.info.status == "RUNNING" and list(children) == ["0"]
    assert synced(runs, "--close") == 0
    parent, _ = server.runs(copy)
    assert parent.info.status == "KILLED" and parent.data.metrics["jobs"] == 1
    shutil.copy(sweep.runs / "1/result.json", copy / "1")  # it was alive and goes on to its end
    shutil.copy(sweep.runs / "ended.json", copy)
    assert synced(runs) == 0
    ended, children = server.runs(copy)
    assert ended.info.run_id == parent.info.run_id and ended.info.status == "FINISHED"
    assert ended.data.tags["coding"] == "las, gated" and sorted(children) == ["0", "1"]


def test_the_next_command_closes_what_a_killed_one_has_left_open(command, server, folder, sweep):
    db = database.connect(TrackingSpec(server.uri, EXPERIMENT, ""))
    gone = {"sweep": "killed", "process": f"{socket.gethostname()} {1 << 30}"}
    for kind in ("sweep", "job"):
        db.client.create_run(db.experiment.experiment_id, None, gone | {"kind": kind}, kind)
    assert command(folder, *SWEEP[:-2], "coding=las", *to(server.uri)).code == 0
    killed = db.find({"sweep": "killed"})
    assert [run.info.status for run in killed] == ["KILLED", "KILLED"]


def test_a_failed_job_is_a_failed_run(command, server, folder, sweep):
    """One of a sweep, of which the other repeats a job of an earlier one."""
    again = ("-m", "experiment=null", "coding=las", "coding.timesteps=6,0")
    done = command(folder, *again, *to(server.uri))
    assert done.code == 1
    parent, children = server.runs(done.runs)
    assert parent.info.status == "FAILED" and parent.data.metrics == {"jobs": 1, "failed": 1}
    assert [children[job].info.status for job in "01"] == ["FINISHED", "FAILED"]
    assert [children[job].data.tags["kind"] for job in "01"] == ["repeat", "job"]
    failed = children["1"]
    assert failed.info.run_name == f"las {done.runs.name[-6:]}/1 tiny" and not failed.data.metrics
    reason = json.loads((done.runs / "1/failed.json").read_text())["error"]
    assert failed.data.tags["error"] == failed.data.tags["mlflow.note.content"] == reason
    assert "coding.timesteps=0" in failed.data.tags["overrides"]
    known = {"model": "tiny", "coding": "las", "timesteps": "0", "transform": "none"}
    assert known.items() <= failed.data.params.items()
    assert "computation" not in failed.data.tags
    files = {file.path for file in server.client.list_artifacts(failed.info.run_id)}
    assert files == {"config.yaml", "pipeline.log"}


def test_a_sweep_of_failed_jobs_is_there_too(command, server, tmp_path, monkeypatch):
    def broken(*arguments: object) -> None:
        raise RuntimeError("out of ink")

    monkeypatch.setattr(runner, "execute", broken)
    done = command(tmp_path, *SWEEP[:2], "coding=gated", "coding.timesteps=6,7", *to(server.uri))
    assert done.code == 1 and "results:" not in done.out
    (runs,) = (tmp_path / "outputs/runs").iterdir()
    parent, children = server.runs(runs)
    assert parent.info.status == "FAILED" and parent.data.metrics == {"jobs": 0, "failed": 2}
    assert {run.info.status for run in children.values()} == {"FAILED"} and len(children) == 2
    failed = children["1"]
    assert failed.info.run_name == f"gated T=7 n=2 {runs.name[-6:]}/1 tiny"
    assert {*failed.data.params} >= AXES and failed.data.params["coding.timesteps"] == "7"
    assert failed.data.tags["error"].startswith("RuntimeError: out of ink; the traceback is in ")


def test_a_failed_job_that_succeeds_in_its_folder_is_one_run(server, folder, sweep):
    runs = folder / "outputs" / "mended"
    copy = runs / "mended"
    shutil.copytree(sweep.runs, copy)
    for path in copy.glob("*.json"):
        path.unlink()
    result = (copy / "1/result.json").rename(copy / "1/later.json")
    RunFolder(copy / "1").fail(["coding=gated"], "no more room")
    assert synced(runs) == 0
    _, children = server.runs(copy)
    assert {job: run.info.status for job, run in children.items()} == {
        "0": "FINISHED",
        "1": "FAILED",
    }
    result.rename(copy / "1/result.json")
    later = (copy / "1/failed.json").stat().st_mtime + 1
    os.utime(copy / "1/result.json", (later, later))
    assert synced(runs) == 0
    _, children = server.runs(copy)
    assert {job: run.info.status for job, run in children.items()} == dict.fromkeys(
        "01", "FINISHED"
    )


def test_a_job_that_failed_of_its_tracking_costs_nothing(command, folder):
    done = command(folder, "experiment=null", "coding=las", "tracking.uri=folder")
    assert done.code == 1 and "sqlite:///FOLDER/mlflow.db" in done.err
    assert "Traceback" not in done.err + done.out


def test_a_result_that_has_changed_replaces_its_run(server, folder, sweep):
    runs = folder / "outputs" / "changed"
    copy = runs / "changed"
    shutil.copytree(sweep.runs, copy)
    for path in copy.glob("*.json"):
        path.unlink()
    assert synced(runs) == 0
    file = copy / "0/result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"energy_J": 42.0}))
    assert synced(runs) == 0
    _, children = server.runs(copy)
    assert children["0"].data.metrics["energy_J"] == 42 and len(children) == 2


def test_one_job_is_logged_by_one_process_at_a_time(sweep, caplog, monkeypatch):
    monkeypatch.setattr(database, "LOCK_SECONDS", 0)
    job = sweep.runs / "0"
    with FileLock(job / ".tracked.lock"):
        logged = tracked.log_job(RunFolder(job), lambda job: (), uri="http://127.0.0.1:1")
    assert logged == ("failed", None)
    assert f"{job}/.tracked.lock" in caplog.text


def test_a_server_that_hangs_delays_a_sweep_by_one_wait(command, folder, sweep, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        done = command(folder, *SWEEP, *to(f"http://127.0.0.1:{hanging.getsockname()[1]}"))
        hanging.setblocking(False)
        hanging.accept()[0].close()
        with pytest.raises(BlockingIOError):  # nothing came after the first request
            hanging.accept()
    assert done.code == 0 and done.out.count("WARNING") == 1


@pytest.mark.parametrize(
    "arguments", [["uri=http://x"], ["tracking.url=http://x"], ["tracking.uri=folder"]]
)
def test_a_wrong_option_is_one_line(arguments, tmp_path, capsys):
    assert main(["sync", "--runs", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "tracking.uri=" in error


def test_runs_that_are_not_there_are_one_line(tmp_path, capsys):
    assert main(["sync", "--runs", str(tmp_path / "nowhere")]) == 2
    assert "give their folder with --runs" in capsys.readouterr().err
