"""Kill -9 at any moment, two processes at once, damaged artifacts: the numbers stay the same."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from pipeline.run.settings import Settings
from tests.pipeline.conftest import fork_server, half_written

Make = Callable[..., Settings]
Moment = tuple[str, int]
REPOSITORY = Path(__file__).parents[3]
CODING = ("coding=multigrain",)
PRELOADED = ("pipeline.run.runner", "pyarrow.parquet", "transformers.models.llama.modeling_llama")
# Folders of the store in the order of their building; the texts are tokenised in two of them.
STAGES = ("tokens", "capture", "distribution", "fitting", "patching", "evaluation", "energy")


def execute(settings: Settings, report: Path, kill: Moment | None) -> None:
    """What a process under test does: one run, on one core, its result into a file."""
    import torch

    from pipeline.run import runner

    torch.set_num_threads(1)
    events = audited(kill)
    result, *_ = runner.execute(settings)
    aside = report.with_suffix(".part")
    aside.write_text(json.dumps({"result": result, "events": events}))
    aside.rename(report)


def audited(kill: Moment | None) -> Counter[str]:
    """Counts what happens to files of an artifact that is being built: they are made, opened, renamed.

    The process is killed before one of these events, which are numbered by artifact, STAGE/KEY.
    """
    events: Counter[str] = Counter()

    def note(event: str, values: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename"):
            for names in re.findall(r"/(\w+)/\.tmp-(\w+)-\w+", str(values[0])):
                events[artifact := "/".join(names)] += 1
                if (artifact, events[artifact]) == kill:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(note)
    return events


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    with fork_server(__name__, *PRELOADED) as context:
        yield context


class Runs:
    """Starts runs of one configuration, each in a process of its own."""

    def __init__(self, context: ForkServerContext, settings: Make, folder: Path) -> None:
        self.context, self.settings, self.folder = context, settings, folder

    def start(self, store: Path, kill: Moment | None = None) -> tuple[ForkServerProcess, Path]:
        report = self.folder / f"{random.random()}.json"
        arguments = (self.settings(store, *CODING), report, kill)
        process = self.context.Process(target=execute, args=arguments)
        process.start()
        return process, report

    def result(self, process: ForkServerProcess, report: Path) -> dict[str, Any]:
        process.join(60)
        assert process.exitcode == 0
        said = json.loads(report.read_text())
        self.events = said["events"]
        return said["result"]

    def complete(self, store: Path) -> dict[str, Any]:
        return self.result(*self.start(store))


@pytest.fixture(scope="module")
def runs(processes, settings, tmp_path_factory) -> Runs:
    return Runs(processes, settings, tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A whole store and its result."""
    store = tmp_path_factory.mktemp("undisturbed")
    return store, runs.complete(store)


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What must be the same: everything but times, hits and what depends on the store's place."""
    moved = ("seconds", "hits", "fitting_s", "conversion_s", "run")
    return {name: value for name, value in result.items() if name not in moved}


@pytest.mark.slow
def test_kill_9_in_any_stage_changes_no_number(runs, undisturbed, tmp_path):
    """At a moment of each artifact's building; every run goes on from what the one before has left."""
    _, expected = undisturbed
    events, draw, store = runs.events, random.Random(20), tmp_path / "store"
    assert {artifact.partition("/")[0] for artifact in events} == {*STAGES}
    for artifact, count in events.items():
        process, _ = runs.start(store, kill=(artifact, draw.randint(3, count)))
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        (found,) = half_written(store)  # all that has its final name is whole
        assert f"/{artifact.replace('/', '/.tmp-')}-" in found
    result = runs.complete(store)
    assert numbers(result) == numbers(expected)
    assert sum(not hit for hit in result["hits"].values()) == 1  # of what was killed last
    assert not half_written(store)


def test_two_processes_build_every_artifact_once(runs, undisturbed, tmp_path):
    _, expected = undisturbed
    started = [runs.start(tmp_path / "store") for _ in range(2)]
    first, second = (runs.result(*one) for one in started)
    assert numbers(first) == numbers(second) == numbers(expected)
    for stage in expected["hits"]:
        assert sorted([first["hits"][stage], second["hits"][stage]]) == [False, True], stage
    assert first["seconds"] == second["seconds"]  # of the one build
    assert not half_written(tmp_path / "store")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def alter(file: Path) -> None:
    """Changes one bit in the middle and keeps size and time, as a bad disk would."""
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("damage", [truncate, alter, Path.unlink])
@pytest.mark.parametrize("which", ["a file", "the manifest"])
def test_a_damaged_artifact_of_any_stage_is_found_and_built_again(damage, which, runs, undisturbed):
    store, expected = undisturbed
    damaged = [folder for stage in STAGES for folder in sorted((store / stage).iterdir())]
    for folder in damaged:
        files = sorted(file for file in folder.iterdir() if file.name != "manifest.json")
        damage(files[-1] if which == "a file" else folder / "manifest.json")
    assert len(half_written(store)) == len(damaged) == len(expected["hits"]) + 2  # two texts
    result = runs.complete(store)
    assert not any(result["hits"].values())
    assert numbers(result) == numbers(expected)
    assert not half_written(store)


def test_one_damaged_artifact_costs_no_other(runs, undisturbed):
    store, expected = undisturbed
    (file,) = store.glob("fitting/*/*.safetensors")
    alter(file)
    result = runs.complete(store)
    assert [stage for stage, hit in result["hits"].items() if not hit] == ["fitting"]
    assert numbers(result) == numbers(expected)
