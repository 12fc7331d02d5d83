"""Kill -9 at any moment, two processes at once, damaged artifacts: the numbers stay the same."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from pipeline.run.settings import Settings
from tests.pipeline.conftest import fork_server, half_written

Make = Callable[..., Settings]
REPOSITORY = Path(__file__).parents[3]
ATTEMPTS = 3  # to kill a run in the middle of a stage
CODING = ("coding=multigrain", "coding.algorithm1.rounds=4")  # its fitting takes a while
PRELOADED = ("pipeline.run.runner", "pyarrow.parquet", "transformers.models.llama.modeling_llama")
# Folders of the store in the order of their building; the texts are tokenised in two of them.
STAGES = ("tokens", "capture", "distribution", "fitting", "patching", "evaluation", "energy")


def execute(settings: Settings, report: Path) -> None:
    """What a process under test does: one run, on one core, its result into a file."""
    import torch

    from pipeline.run import runner

    torch.set_num_threads(1)
    result, *_ = runner.execute(settings)
    aside = report.with_suffix(".part")
    aside.write_text(json.dumps(result))
    aside.rename(report)


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    with fork_server(__name__, *PRELOADED) as context:
        yield context


class Runs:
    """Starts runs of one configuration, each in a process of its own."""

    def __init__(self, context: ForkServerContext, settings: Make, folder: Path) -> None:
        self.context, self.settings, self.folder = context, settings, folder

    def start(self, store: Path) -> tuple[ForkServerProcess, Path]:
        report = self.folder / f"{random.random()}.json"
        arguments = (self.settings(store, *CODING), report)
        process = self.context.Process(target=execute, args=arguments)
        process.start()
        return process, report

    def result(self, process: ForkServerProcess, report: Path) -> dict[str, Any]:
        process.join(60)
        assert process.exitcode == 0
        return json.loads(report.read_text())

    def complete(self, store: Path) -> dict[str, Any]:
        return self.result(*self.start(store))


@pytest.fixture(scope="module")
def runs(processes, settings, tmp_path_factory) -> Runs:
    return Runs(processes, settings, tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A whole store and its result. The first run warms the processes up, the second counts."""
    runs.complete(tmp_path_factory.mktemp("first"))
    store = tmp_path_factory.mktemp("undisturbed")
    return store, runs.complete(store)


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What must be the same: everything but times, hits and what depends on the store's place."""
    moved = ("seconds", "hits", "fitting_s", "conversion_s", "run")
    return {name: value for name, value in result.items() if name not in moved}


def seconds(store: Path, stage: str) -> float:
    manifests = (store / stage).glob("*/manifest.json")
    return max(json.loads(path.read_text())["seconds"] for path in manifests)


def kill_while_building(runs: Runs, store: Path, stage: str, delay: float) -> list[str]:
    """Kill -9, `delay` seconds after a stage begins; the stages that were left half built."""
    process, _ = runs.start(store)
    while process.is_alive() and not list((store / stage).glob("*")):
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    return [path.parent.name for path in store.glob("*/.tmp-*")]


def test_kill_9_in_any_stage_changes_no_number(runs, undisturbed, tmp_path):
    """At a moment of each stage's building; again where the stage was over before the signal came."""
    whole, expected = undisturbed
    draw = random.Random(20)
    interrupted: set[str] = set()
    for stage, attempt in itertools.product(STAGES, range(ATTEMPTS)):
        if stage in interrupted:
            continue
        store = tmp_path / f"{stage}{attempt}"
        delay = draw.uniform(0, 0.8) * seconds(whole, stage)
        interrupted |= {*kill_while_building(runs, store, stage, delay)}
        damaged = [found for found in half_written(store) if "/.tmp-" not in found]
        assert not damaged  # whatever has its final name is whole
        result = runs.complete(store)
        assert numbers(result) == numbers(expected), f"killed in {stage}"
        assert not half_written(store)
    assert len(interrupted) >= 5  # they did hit builds


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
