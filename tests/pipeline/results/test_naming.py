"""Names of tables: a person can read them, and no two configurations share one."""

from __future__ import annotations

import re

import pytest

from pipeline.results.folders import RunFolder
from pipeline.results.naming import job_name, run_stem
from tests.pipeline.conftest import Finished

GATED = {
    "model": "smollm2-135m",
    "coding": "gated",
    "timesteps": 6,
    "grains": 2,
    "transform": "none",
}


@pytest.mark.parametrize(
    ("overrides", "swept", "name"),
    [
        (["coding=gated", "timesteps=6"], False, "smollm2-135m_gated_T6_n2"),
        (["coding=gated", "store.path=elsewhere"], False, "smollm2-135m_gated_T6_n2"),
        (["coding.mu=0.1"], False, "smollm2-135m_gated_T6_n2_coding.mu=0.1"),
        (["row=mine", "coding=gated"], False, "mine_coding=gated"),
        (["row='my own'", "table.columns=[T,n]"], False, "my-own"),
        (
            ["coding=gated,las", "timesteps=4,6"],
            True,
            "smollm2-135m_coding=gated+las_timesteps=4+6",
        ),
        (["model=a,b", "coding=las"], True, "smollm2-135m_coding=las_model=a+b"),
    ],
)
def test_a_run_without_an_experiment_is_called_after_what_was_asked(overrides, swept, name):
    assert run_stem(GATED, overrides, swept) == name


def test_what_no_name_has_room_for_still_tells_runs_apart():
    one, other = (
        run_stem(GATED, [f"calibration.corpus={name}", "coding.algorithm1.base_lr=1e-3"], False)
        for name in ("wikipedia", "wikitext2")
    )
    assert one != other and re.fullmatch("smollm2-135m_gated_T6_n2_[0-9a-f]{8}", one)
    paths = [run_stem(GATED, [f"model.path=/{p}/net"], False) for p in "ab"]
    assert len(set(paths)) == 2
    assert run_stem(GATED | {"transform": "rotate"}, [], False) == "smollm2-135m_gated_T6_n2_rotate"
    dense = {"model": "m", "coding": "dense", "timesteps": None, "grains": None}
    assert run_stem(dense, [], False) == "m_dense"


def test_single_runs_leave_tables_of_their_own(command, tmp_path):
    done: list[Finished] = [
        command(tmp_path, "coding=las", "timesteps=4"),
        command(tmp_path, "coding=las", "timesteps=6", "table.columns=[coding,T,ppl]"),
        command(tmp_path, "coding=las", "timesteps=4", "row=mine"),
    ]
    assert [run.code for run in done] == [0, 0, 0]
    names = [run.table.stem for run in done]
    assert len(set(names)) == 3 and names[0].startswith("tiny_las_T4_n1_")
    assert names[2].startswith("mine_")
    assert all(run.table.exists() for run in done)
    heads = re.findall(r"^(.*)\n-+ ", done[1].out, re.MULTILINE)
    assert [head.split() for head in heads] == [["coding", "T", "ppl", "wikipedia", "vs", "dense"]]
    assert "saving" not in heads[0] and "energy" in done[1].table.read_text().splitlines()[0]


@pytest.fixture(scope="module")
def varied(tmp_path_factory, command) -> Finished:
    """A sweep over what no column of a table has."""
    folder = tmp_path_factory.mktemp("varied")
    done: Finished = command(folder, "-m", "experiment=null", "coding=las", "fitting.seed=1,2")
    assert done.code == 0, done.err
    return done


def test_jobs_of_a_sweep_and_runs_of_a_command_have_names_of_their_own(varied):
    jobs = RunFolder(varied.runs).jobs
    letters = varied.runs.name[-6:]
    names = [job_name(j, "tiny", "las T=6", j.result["run"]["overrides"]) for j in jobs]
    assert names == [
        f"las T=6 {letters}/{number} fitting.seed={number + 1} tiny" for number in (0, 1)
    ]
    alone = [
        job_name(RunFolder(varied.cwd / run / "0"), "tiny", "las T=6", overrides)
        for run, overrides in {
            "20260101-120000-aaaaaa": ["coding=las", "timesteps=6", "calibration.windows=8"],
            "20260101-120005-bbbbbb": ["coding.mu=1", "model.path=/a/b", "runtime.batch=2"],
            "mine": [f"evaluation.tasks=[{'piqa,' * 20}]"],
        }.items()
    ]
    assert alone == [
        "las T=6 aaaaaa/0 calibration.windows=8 tiny",
        "las T=6 bbbbbb/0 mu=1 tiny",
        "las T=6 mine/0 evaluation.tasks=[piqa,piqa,piqa,piqa,piqa,piqa… tiny",
    ]
