"""Failed jobs of a sweep: freed memory, one list at the end, only what is missing the next time."""

from __future__ import annotations

import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from joblib.externals.loky.process_executor import TerminatedWorkerError
from omegaconf import OmegaConf

from pipeline.commands import launch
from pipeline.results.folders import RunFolder
from pipeline.run import failures, models, runner
from stages import evaluation
from stages.errors import InputError
from tests.pipeline.conftest import Finished

Command = Callable[..., Finished]
SWEEP = ("-m", "experiment=null", "coding=las", "coding.timesteps=5,6")


class Broken:
    """Fails the evaluation of the first job and looks at each start whose models are still there."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error
        self.models: list[weakref.ref[Any]] = []
        self.alive: list[int] = []

    def perplexity(self, model: Any, *arguments: Any, **options: Any) -> Any:
        if not self.models:
            self.models.append(weakref.ref(model))
            raise self.error("out of ink")
        return self.whole(model, *arguments, **options)

    def execute(self, settings: Any, command: str) -> Any:
        self.alive.append(sum(model() is not None for model in self.models))
        return self.run(settings, command)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        self.whole, self.run = evaluation.perplexity, runner.execute
        patch.setattr(evaluation, "perplexity", self.perplexity)
        patch.setattr(runner, "execute", self.execute)


@pytest.fixture
def no_model() -> Iterator[None]:
    """Other tests leave theirs in memory."""
    models.forget()
    yield
    models.forget()


@pytest.mark.parametrize("error", [RuntimeError, InputError])
def test_the_model_of_a_failed_job_is_gone_before_the_next_starts(
    error, command: Command, no_model, tmp_path, monkeypatch
):
    broken = Broken(error)
    broken.install(monkeypatch)
    done = command(tmp_path, *SWEEP)
    assert done.code == 1 and broken.alive == [0, 0]
    (line,) = done.err.splitlines()
    reason, _, where = line.partition("; the traceback is in ")
    assert reason.endswith(f"{error.__name__}: out of ink" if where else ": out of ink")
    assert "coding.timesteps=5" in line and "Traceback" not in done.out
    if error is RuntimeError:
        assert "in perplexity" in (tmp_path / where).read_text()
    assert [result["timesteps"] for result in done.results] == [6]
    monkeypatch.undo()
    again = command(tmp_path, *SWEEP)
    assert again.code == 0
    built = [[s for s, hit in result["hits"].items() if not hit] for result in again.results]
    assert built == [["evaluation ppl_wikipedia", "energy"], []]


@pytest.mark.parametrize("keep", ["error", "cache"])
def test_it_would_stay_if_its_error_or_the_cache_kept_it(
    keep, command: Command, no_model, tmp_path, monkeypatch
):
    broken, kept = Broken(RuntimeError), []
    broken.install(monkeypatch)
    record = failures.record

    def keeping(*arguments: Any) -> None:
        kept.append(sys.exception())
        record(*arguments)

    if keep == "error":
        monkeypatch.setattr(failures, "record", keeping)
        monkeypatch.setattr(failures.traceback, "clear_frames", lambda frames: None)
    else:
        monkeypatch.setattr(models, "forget", lambda: None)
    command(tmp_path, *SWEEP)
    assert broken.alive == [0, 1]


def test_ctrl_c_ends_a_sweep_even_where_a_library_makes_another_error_of_it(
    command: Command, tmp_path, monkeypatch
):
    started = []

    def execute(settings: Any, command: str) -> Any:
        started.append(settings)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr(runner, "execute", execute)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = command(tmp_path, *SWEEP)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 130 and len(started) == 1
    assert done.err.startswith("interrupted; the same command goes on") and "shape" not in done.out
    assert not list(tmp_path.rglob("failed.json"))


class Killed(BaseException):
    """Nothing of a job catches it, as nothing does kill -9."""


def test_a_launcher_that_ends_early_costs_no_finished_job(command, tmp_path, monkeypatch):
    hydra, whole, jobs = launch._job, runner.execute, []

    def execute(settings: Any, command: str) -> Any:
        jobs.append(settings)
        if len(jobs) == 2:
            raise Killed
        return whole(settings, command)

    def launched() -> None:
        try:
            hydra()
        except Killed:  # as joblib tells it
            raise TerminatedWorkerError("A worker was terminated\nby the system") from None

    monkeypatch.setattr(launch, "_job", launched)
    monkeypatch.setattr(runner, "execute", execute)
    done = command(tmp_path, "-m", "experiment=null", "coding=las,gated,rate")
    assert done.code == 1 and [result["coding"] for result in done.results] == ["las"]
    job, launcher = done.err.splitlines()
    assert job.startswith("failed: ") and "coding=gated: ended without a result" in job
    assert launcher.startswith("failed: hydra/launcher: TerminatedWorkerError: A worker was")


def test_a_launcher_without_its_plug_in_names_what_to_install():
    name = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    with pytest.raises(RuntimeError) as raised:
        Plugins.instance()._instantiate(OmegaConf.create({"_target_": name + "Missing"}))
    failure = failures.stopped(raised.value)
    assert failure["overrides"] == ["hydra/launcher"]
    assert failure["error"].startswith("hydra_submitit_launcher is not installed; ")


def test_the_list_is_in_the_order_of_the_jobs(tmp_path: Path):
    for number in (10, 2):
        (tmp_path / f"{number}/.hydra").mkdir(parents=True)
        RunFolder(tmp_path / str(number)).fail([f"job={number}"], "why")
    assert [f["overrides"] for f in RunFolder(tmp_path).failures] == [["job=2"], ["job=10"]]
