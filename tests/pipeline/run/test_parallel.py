"""Jobs at once on one store and one database, interrupted sweeps, and the launchers' configurations."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.pipeline.conftest import Finished, Tiny, fork_server, half_written

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[3]
PRELOADED = (
    *(
        "pipeline.commands.launch",
        "pipeline.run.runner",
        "pipeline.commands.sweep",
        "pipeline.tracking.tracked",
        "pyarrow.parquet",
    ),
    *("mlflow.store.tracking.sqlalchemy_store", "transformers.models.llama.modeling_llama"),
    "hydra_plugins.hydra_joblib_launcher._core",
)
JOBS = ("experiment=none", "coding=las,gated", "coding.timesteps=4,5,6,7")


def main_of_its_own(cwd: Path, arguments: Sequence[str], log: Path) -> None:
    """`python -m pipeline` in a process, whose workers are forks of it: all is imported already.

    Writes each folder that it or a worker makes or renames to `log`, as `<event> <process> <path>`.
    """
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.backend.context import set_start_method

    from pipeline.commands.cli import main
    from pipeline.commands.launch import RUN_ID

    def note(event: str, values: tuple[Any, ...]) -> None:
        if event in ("os.mkdir", "os.rename"):
            path = values[0] if event == "os.mkdir" else values[1]
            line = f"{event} {os.getpid()} {path}\n".encode()
            with open(log, "ab", buffering=0) as stream:
                stream.write(line)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests
    os.setsid()  # a group of its own, as a terminal's foreground job
    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(cwd / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.pop(RUN_ID, None)
    sys.argv = ["pipeline", *arguments]
    sys.addaudithook(note)
    set_start_method("fork", force=True)  # joblib warns of it; here no thread has started
    code = main()
    get_reusable_executor().shutdown(wait=True)  # as the end of an interpreter does
    sys.exit(code)


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    with fork_server(__name__, *PRELOADED) as context:
        yield context


class Started:
    """A command in a process of its own."""

    def __init__(self, context: ForkServerContext, cwd: Path, arguments: Sequence[str]) -> None:
        self.cwd, self.log = cwd, cwd / "log"
        self.process: ForkServerProcess = context.Process(
            target=main_of_its_own, args=(cwd, arguments, self.log)
        )
        self.process.start()

    @property
    def store(self) -> Path:
        return self.cwd / "outputs/store"

    def finished(self) -> Finished:
        self.process.join(600)
        code = self.process.exitcode
        assert code is not None
        out, err = ((self.cwd / name).read_text() for name in ("out", "err"))
        return Finished(code, out, err, self.cwd)

    def noted(self, event: str, pattern: str) -> list[tuple[str, ...]]:
        """(process, groups of the pattern) of each event at a folder of the store."""
        text = self.log.read_text()
        return re.findall(rf"^{event} (\d+) \S*outputs/store/{pattern}$", text, re.MULTILINE)

    def interrupt_in(self, stage: str) -> None:
        """Ctrl-C, as a terminal sends it, once a stage is being built."""
        deadline = time.monotonic() + 300
        while not list(self.store.glob(f"{stage}/.tmp-*")):
            assert self.process.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        os.killpg(self.process.pid, signal.SIGINT)  # type: ignore[arg-type]

    def gone_after(self, seconds: float) -> bool:
        """Whether no process of the command is left, workers and joblib's tracker included."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process.pid, 0)  # type: ignore[arg-type]
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False


@pytest.fixture
def start(processes: ForkServerContext, tiny_run: Tiny, tmp_path: Path) -> Callable[..., Started]:
    def started(*overrides: str) -> Started:
        flags = [override for override in overrides if override.startswith("-")]
        return Started(processes, tmp_path, [*flags, *tiny_run.overrides, *overrides[len(flags) :]])

    return started


def test_eight_jobs_at_once_build_every_artifact_once_and_are_all_logged(start):
    sweep = start(
        "-m", *JOBS, "hydra/launcher=joblib", "hydra.launcher.n_jobs=8", "tracking.enabled=true"
    )
    done = sweep.finished()
    assert done.code == 0 and "failed" not in done.err, done.err
    assert len(re.findall(r"^tiny +(?:las|gated) ", done.out, re.MULTILINE)) == 8
    # The making of parents repeats it.
    begun = {*sweep.noted("os.mkdir", r"(\w+)/\.tmp-(\w+)-[^/\s]+")}
    placed = sweep.noted("os.rename", r"(\w+)/(\w+)")
    there = {path.parts[-2:] for path in sweep.store.glob("[!.]*/[!.]*")}
    assert Counter(stage for stage, _ in there) == {
        **{"tokens": 2, "capture": 1, "distribution": 1},
        **{"fitting": 8, "patching": 8, "evaluation": 9, "energy": 8},  # one of the dense model
    }
    for events in (begun, placed):
        assert len(events) == len(there) and {(stage, key) for _, stage, key in events} == there
    assert len({process for process, *_ in begun}) == 8
    builders = Counter(
        key for r in done.results for stage, key in r["keys"].items() if not r["hits"][stage]
    )
    assert builders == {key: 1 for stage, key in there if stage != "tokens"}
    assert not half_written(sweep.store)
    client = MlflowClient(f"sqlite:///{sweep.cwd}/outputs/mlflow/mlflow.db")
    runs = [
        run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])
    ]
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert all(run.info.status == "FINISHED" for run in runs)
    logged = {
        (run.data.params["coding"], int(run.data.params["timesteps"])): run.data.metrics["nmse"]
        for run in children
    }
    assert len(children) == 8
    assert logged == {(r["coding"], r["timesteps"]): r["nmse"] for r in done.results}


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_ctrl_c_in_mid_stage_leaves_a_store_from_which_the_same_command_goes_on(launcher, start):
    sweep = (
        *("-m", "experiment=none", "coding=multigrain", "coding.grains=2,3"),
        *("coding.algorithm1.rounds=8", f"hydra/launcher={launcher}"),
    )
    first = start(*sweep)
    first.interrupt_in("fitting")
    done = first.finished()
    assert done.code == 130
    assert re.search("^interrupted; the same command goes on", done.err, re.MULTILINE)
    assert first.gone_after(seconds=30)
    assert not list((first.store / "fitting").glob("[!.]*"))
    whole = set(first.store.glob("[!.]*/[!.]*"))
    assert {"capture", "distribution"} <= {path.parent.name for path in whole}
    assert not [found for found in half_written(first.store) if "/.tmp-" not in found]
    first.log.unlink()
    second = start(*sweep)
    done = second.finished()
    assert done.code == 0 and len(done.results) == 2, done.err
    assert not whole & {
        second.store / stage / key for _, stage, key in second.noted("os.rename", r"(\w+)/(\w+)")
    }
    assert not half_written(second.store)


def test_two_workers_of_their_own_by_default_print_the_table(tiny_run, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    environment.pop("PIPELINE_RUN_ID", None)
    sweep = ["-m", "experiment=null", "coding=las,gated", "hydra/launcher=joblib"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *sweep, *tiny_run.overrides],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True},
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^tiny +(las|gated) ", done.stdout, re.MULTILINE) == ["las", "gated"]
    assert "n_jobs=2" in done.stdout
    (record,) = tmp_path.glob("outputs/store/capture/*/manifest.json")
    assert json.loads(record.read_text())["runtime"]["device"] in ("cpu", "cuda")
