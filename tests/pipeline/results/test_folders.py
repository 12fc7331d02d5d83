"""Results, tables and failures are looked for in the folder that Hydra was given."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from pipeline.results.folders import RunFolder
from tests.pipeline.conftest import Finished

LAS = ("coding=las", "timesteps=4")
BAD = ("coding=las", "evaluation.windows=9000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


def test_a_run_in_a_folder_of_its_own_prints_its_table_or_its_failure_once(command, folder):
    done: Finished = command(folder, *LAS, "hydra.run.dir=out/a/run")
    assert done.code == 0 and (folder / "out/a/run/result.json").exists()
    assert "results: out/a/run/result.json" in done.out and len(pd.read_csv(done.table)) == 1
    bad = command(folder, *BAD, "hydra.run.dir=out/a/bad")
    (line,) = bad.err.splitlines()
    assert bad.code == 1 and line.startswith("failed: ") and "9000 windows" in line
    assert "9000 windows" not in bad.out and "table:" not in bad.out
    assert "9000 windows" in (folder / "out/a/bad/pipeline.log").read_text()


def test_a_failure_in_the_folder_of_an_earlier_result_leaves_no_result(command, folder):
    assert command(folder, *LAS, "hydra.run.dir=again").code == 0
    bad = command(folder, *BAD, "hydra.run.dir=again")
    assert bad.code == 1 and "table:" not in bad.out
    assert not (folder / "again/result.json").exists()


@pytest.mark.slow
def test_a_sweep_is_its_own_jobs_at_any_depth_of_a_folder_that_was_used_before(command, folder):
    sweep = ("coding=las,rate", "timesteps=4", "hydra.sweep.dir=swept")
    first = command(folder, *sweep, "hydra.sweep.subdir=a/${hydra:job.num}")
    assert first.code == 0 and "results: swept/**/result.json" in first.out
    assert list(pd.read_csv(first.table)["coding"]) == ["las", "rate"]
    second = command(folder, *sweep, "evaluation.windows=2,9000")
    assert second.code == 1 and len(second.err.splitlines()) == 2
    rows = pd.read_csv(second.table)
    assert list(rows["coding"]) == ["las", "rate"] and second.table != first.table
    third = command(folder, *LAS, "hydra.mode=MULTIRUN", "hydra.sweep.dir=swept")
    assert third.code == 0 and list(pd.read_csv(third.table)["coding"]) == ["las"]
    assert [job.path.name for job in RunFolder(folder / "swept").jobs] == ["0"]
    assert RunFolder(folder / "swept/0").sweep == RunFolder(folder / "swept")
    assert RunFolder(folder / "swept/a/0").sweep is None  # of the sweep before


@pytest.mark.parametrize("place", ["file/store", "/proc/store"])
def test_a_store_that_cannot_be_made_is_one_line(place, command, folder):
    (folder / "file").write_text("in the way")
    done = command(folder, *LAS, f"store.path={place}")
    (line,) = done.err.splitlines()
    assert done.code == 1 and f"store.path={place}: nothing can be written to" in line
    exported = command(folder, *LAS, "export.enabled=true", f"export.folder={place}")
    assert exported.code == 1 and exported.err.count("\n") == 1 and "export.folder" in exported.err
    assert "Traceback" not in done.out + exported.out
