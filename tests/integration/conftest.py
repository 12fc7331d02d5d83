"""A sweep or a conversion of a tiny model, through whichever launcher, and what must come of it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.conftest import Finished, Tiny, half_written, tiny_run
from tests.pipeline.run.test_shares import contents

__all__ = ["tiny_run"]
REPOSITORY = Path(__file__).parents[2]
CODINGS = ["las", "gated", "multigrain"]


@pytest.fixture
def sweep(tiny_run: Tiny, tmp_path: Path) -> Callable[..., Finished]:
    """Runs three jobs with the given overrides, prints what they print, checks table and store."""

    def run(*overrides: str) -> Finished:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        environment.pop("PIPELINE_RUN_ID", None)
        jobs = ["-m", "experiment=null", f"coding={','.join(CODINGS)}", "tracking.enabled=true"]
        command = [sys.executable, "-m", "pipeline", *jobs, *tiny_run.overrides[:-1], *overrides]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        print(done.stdout, done.stderr)
        finished = Finished(done.returncode, done.stdout, done.stderr, tmp_path)
        check(finished)
        return finished

    return run


@pytest.fixture
def shared(tiny_run: Tiny, tmp_path: Path) -> Callable[..., None]:
    """Runs one conversion on two workers, and by itself, and compares every byte that they leave."""

    def run(*overrides: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        environment.pop("PIPELINE_RUN_ID", None)
        given = [
            *tiny_run.overrides,
            "coding=gated",
            "evaluation.tasks=[piqa]",
            "runtime.batch=1",
        ]
        stores = []
        for name, more in (("shared", ["runtime.workers=2", *overrides]), ("alone", [])):
            stores.append(tmp_path / name)
            command = [sys.executable, "-m", "pipeline", *given, f"store.path={stores[-1]}", *more]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
            )
            print(done.stdout, done.stderr)
            assert done.returncode == 0
        assert contents(stores[0]) == contents(stores[1])
        assert not half_written(stores[0])

    return run


def check(done: Finished) -> None:
    assert done.code == 0
    assert re.findall(r"^tiny +(\w+) ", done.out, re.MULTILINE) == CODINGS
    assert [result["coding"] for result in done.results] == CODINGS
    for stage in ("capture", "distribution"):
        assert len({result["keys"][stage] for result in done.results}) == 1
        assert [result["hits"][stage] for result in done.results].count(False) == 1
    assert not half_written(done.cwd / "outputs/store")
