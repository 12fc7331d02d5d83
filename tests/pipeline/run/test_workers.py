"""Several workers of one conversion: the same bytes, deaths among them, refusals in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.commands import upkeep
from pipeline.run import engines, runner, workers
from pipeline.run.shares import Shared
from pipeline.store.store import SHARES, Store
from stages.errors import InputError
from tests.pipeline.conftest import REPOSITORY
from tests.pipeline.run.test_shares import MEASURED, contents, started


def noting(log: Path, dies: bool, function: Callable[[], Any]) -> Any:
    """Runs a worker's function; writes down each unit that is finished, and kills itself in its second."""
    begun = 0

    def note(event: str, values: tuple[Any, ...]) -> None:
        nonlocal begun
        if event == "os.mkdir" and f"/{SHARES}/.tmp-" in str(values[0]):
            begun += 1
            if dies and begun == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rename" and f"/{SHARES}/.tmp-" in str(values[0]):
            with log.open("a") as stream:
                stream.write(f"{Path(values[1]).name}\n")

    sys.addaudithook(note)
    return function()


@contextmanager
def cleaned(folder: Path) -> Iterator[None]:
    """Deletes what no run is at work with, as `store gc` does, again and again."""
    ended = threading.Event()

    def clean() -> None:
        while not ended.wait(0.1):
            upkeep.gc(Store(folder), 0.0, None, [], True)

    with ThreadPoolExecutor(1) as thread:
        cleaning = thread.submit(clean)
        try:
            yield
        finally:
            ended.set()
        cleaning.result()


@pytest.mark.slow
def test_two_workers_one_of_which_is_killed_and_three_make_the_bytes_of_one_process(
    settings, tmp_path, monkeypatch
):
    whole, _, _ = runner.execute(settings(tmp_path / "alone", *MEASURED))
    store, log = tmp_path / "shared", tmp_path / "log"
    run = started(settings, store)  # what a driver that was killed has left
    assert run.chain.capture is not None and run.runtime is not None
    left = Shared(run.chain.capture, run.store, run.runtime)
    left.work(start=0.0, most=1)
    begun: list[engines.Worker] = []
    start = engines.Local.start

    def first_dies(local: engines.Local, function: engines.Function) -> engines.Worker:
        begun.append(start(local, partial(noting, log, not begun, function)))
        return begun[-1]

    with monkeypatch.context() as patch:
        patch.setattr(engines.Local, "start", first_dies)
        result, sites, _ = runner.execute(settings(store, *MEASURED, "runtime.workers=2"))
    assert len(begun) == 3  # one more in the place of the first
    built = Counter(log.read_text().split())
    assert set(built.values()) == {1} and left.steps[0].key() not in built
    assert {step.key() for step in left.steps[1:]} <= set(built)
    assert result["keys"] == whole["keys"] and [*result["hits"]] == [*whole["hits"]]
    assert not any(result["hits"].values())
    assert contents(store) == contents(tmp_path / "alone")
    assert not [path for path in store.rglob("*") if path.name.startswith(".tmp-")]
    energy = run.store.open("energy", result["keys"]["energy"])
    assert energy.manifest["runtime"]["workers"] == 2
    with cleaned(tmp_path / "three"):
        three, *_ = runner.execute(settings(tmp_path / "three", *MEASURED, "runtime.workers=3"))
    assert three["keys"] == whole["keys"] and not any(three["hits"].values())
    assert contents(tmp_path / "three") == contents(tmp_path / "alone")


class Scripted:
    """An engine whose workers end at once, in this process, each with the outcome that the test lists."""

    threads = 1

    def __init__(self, *endings: Any) -> None:
        self.endings, self.stopped = [*endings], 0

    def start(self, function: engines.Function) -> Any:
        ending = self.endings.pop(0) if self.endings else ChildProcessError("ended by signal 9")
        return ScriptedWorker(self, ending)

    def close(self) -> None:
        return None


class ScriptedWorker:
    def __init__(self, engine: Scripted, ending: Any) -> None:
        self._engine, self._ending = engine, ending

    def done(self) -> bool:
        return self._ending is not None

    def result(self) -> Any:
        if isinstance(self._ending, Exception):
            raise self._ending
        return self._ending

    def stop(self) -> None:
        self._engine.stopped += 1


@pytest.mark.parametrize(
    ("ending", "error", "says", "stopped"),
    [
        (workers.Outcome(refused="no such text"), InputError, "no such text", 1),
        (
            workers.Outcome(failed="Traceback\nOSError: it broke"),
            RuntimeError,
            "1: OSError: it b",
            1,
        ),
        (ChildProcessError("ended by signal 9"), InputError, "7 times.*signal 9.*fewer runtime", 2),
    ],
    ids=["refused", "failed", "dies"],
)
def test_how_a_worker_ends_is_told_in_a_line(
    ending, error, says, stopped, settings, tmp_path, monkeypatch
):
    engine = Scripted(ending, None)
    monkeypatch.setattr(engines, "engine", lambda *_: engine)
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.0)
    with pytest.raises(error, match=says) as raised:
        runner.execute(settings(tmp_path, "runtime.workers=2"))
    assert engine.stopped == stopped and len(str(raised.value).splitlines()) == 1
    if isinstance(ending, workers.Outcome) and ending.failed:
        assert ending.failed in raised.value.__notes__, "the log has the traceback"


DRIVER = """
import sys, time
from functools import partial
from pathlib import Path
from pipeline.run.engines import LocalWorker
from tests.pipeline.run.tidying import tidies

if __name__ == "__main__":
    LocalWorker(partial(tidies, Path(sys.argv[1])))
    time.sleep(60)
"""


def test_a_worker_whose_driver_is_killed_cleans_up(tmp_path):
    held = tmp_path / "held"
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    path = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, str(script), str(held)], env=path) as driver:
        _until(held.exists)
        driver.kill()
    _until(lambda: not held.exists())


def _until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_slurm_that_takes_no_jobs_is_a_line(settings, tmp_path):
    def submit(function: engines.Function) -> None:
        raise RuntimeError("sbatch: error: no\nsbatch: fatal: controller")

    executor = SimpleNamespace(update_parameters=lambda **_: None, submit=submit)
    given = settings(tmp_path, "runtime.workers=2", "runtime.engine=slurm").runtime
    with pytest.MonkeyPatch.context() as patch:
        fake = SimpleNamespace(AutoExecutor=lambda **_: executor)
        patch.setitem(sys.modules, "submitit", fake)
        with pytest.raises(
            InputError, match="slurm: sbatch: error: no sbatch: fatal: controller; "
        ):
            engines.engine(given, tmp_path).start(print)


def test_a_worker_with_other_keys_is_refused(settings, tmp_path):
    given = settings(tmp_path, "runtime.workers=2")
    order = workers.Order((1, 2), given, "none", Path.cwd(), 1, frozenset({"0" * 32}))
    threads = workers.torch.get_num_threads()
    outcome = workers.carried_out(order, runner.work)
    workers.torch.set_num_threads(threads)
    assert "worker 2 has another key of capture" in (outcome.refused or "")


@pytest.mark.parametrize("engine", ["ray", "slurm"])
def test_an_engine_that_is_missing_or_has_no_such_option_is_a_line(engine, settings, tmp_path):
    module = {"ray": "ray", "slurm": "submitit"}[engine]
    given = settings(tmp_path, "runtime.workers=2", f"runtime.engine={engine}").runtime
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=rf"pip install .*\[{engine}\]"):
            engines.engine(given, tmp_path)
    odd = settings(
        tmp_path, "runtime.workers=2", f"runtime.engine={engine}", "runtime.cluster={patrition: x}"
    )
    with pytest.raises(InputError, match="runtime.cluster.patrition"):
        engines.engine(odd.runtime, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["runtime.workers=0"], "runtime.workers=0"),
        (["runtime.engine=condor"], "choose local or ray or slurm"),
        (["runtime.cluster={partition: x}"], "give runtime.engine=ray or slurm"),
        (["runtime.workers=3", "runtime.devices=[cuda:0,cuda:1]"], "give each its own device"),
        (
            ["runtime.workers=2", "runtime.engine=ray", "runtime.devices=[cuda:0,cuda:1]"],
            "runtime.devices=null",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, says, settings, tmp_path):
    with pytest.raises(Exception, match=says):
        settings(tmp_path, *overrides)


def test_workers_in_jobs_at_once_are_refused(command, tmp_path):
    done = command(
        tmp_path,
        *("-m", "experiment=none", "coding=gated", "timesteps=3,4", "runtime.workers=2"),
        *("hydra/launcher=joblib", "hydra.launcher.n_jobs=1"),
    )
    assert done.code == 1 and "give one of the two" in done.err
