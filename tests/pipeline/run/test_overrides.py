"""One conversion or an experiment, never a mixture: rows are what their names say."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from pipeline.results import naming
from pipeline.run.jobs import jobs
from pipeline.run.overrides import settled
from stages.errors import InputError
from tests.pipeline.conftest import CONF, main_in

EXPERIMENTS = sorted({path.stem for path in (CONF / "experiment").glob("*.yaml")} - {"none"})


def named(*overrides: str) -> list[str]:
    return [job.settings.name for job in jobs(overrides)]


def test_without_an_override_of_the_coding_it_is_the_experiment():
    assert settled([]) == [] and settled(["timesteps=8"]) == ["timesteps=8"]
    assert settled(["experiment=null", "variant=null"]) == ["experiment=none", "variant=none"]
    assert settled(["timesteps=8"], "codings") == ["timesteps=8", "experiment=codings"]
    assert settled(["--cfg", "job", "-m"]) == ["--cfg", "job", "-m"]
    assert len(jobs([])) == 6


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        (["coding=multigrain"], ["multigrain T=6 n=2"]),
        (["coding=las", "timesteps=8"], ["las T=8 n=1"]),
        (["coding.timesteps=7"], ["gated T=7 n=2"]),
        (["label=mine"], ["mine T=6 n=2"]),
        (["coding=las,gated", "timesteps=4,5"], ["las T=4 n=1", "las T=5 n=1"]),
    ],
)
def test_an_override_of_the_coding_is_one_conversion_or_a_sweep_of_what_it_lists(overrides, rows):
    assert named(*overrides)[:2] == rows
    assert len(named(*overrides)) == (4 if "," in overrides[0] else 1)
    again = settled(settled(overrides, "codings"))  # settled twice is settled once
    assert again == settled(overrides) and "experiment=none" in again
    assert ("hydra.mode=MULTIRUN" in again) == ("," in overrides[0])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["coding=multigrain", "variant=dense,gated2"], "both choose codings: give one of them"),
        (["experiment=null", "coding=las", "variant=gated2"], "both choose codings"),
        (
            ["experiment=codings", "coding=gated"],
            "give variant=gated2,gated3,gated2_offset instead",
        ),
        (
            ["variant=gated2", "coding.grains=3"],
            "Give coding=gated in place of variant=gated2 for",
        ),
        (["variant=gated2,gated3", "label=x"], "coding=gated in place of variant=gated2,gated3"),
        (["variant=glob(gated*)"], "variant=glob(gated*): give the names, as variant=A,B"),
        (["hydra.output_subdir=null"], "choose the folder by hydra.run.dir=FOLDER"),
        (["experiment=codings", "coding=gif_smoothed"], "give variant=gif_smoothed instead, or"),
        (["experiment=quickstart", "coding.timesteps=8"], "dense have no timesteps"),
        (["experiment=quickstart", "coding.grains=3"], "gated2, gated3 set it themselves; dense,"),
        (
            ["experiment=algorithm1", "coding.algorithm1.neuron_lr=1"],
            "eta1_1e-4, eta1_1e-2 set it",
        ),
        (["experiment=calibration_ablation", "calibration=paper"], "sets calibration.length, cal"),
        (
            ["experiment=quickstart", "label=x"],
            "would give the 6 rows of experiment=quickstart one",
        ),
        (["variant=gated2", "coding.grains=3"], "gated2 set it themselves"),
        (["coding=null"], "coding=null: give one name, out of compander, dense"),
        (["experiment=codings,frontier"], "give one experiment a command"),
        (
            ["model.path=/a", "b"],
            "b: options are given as KEY=VALUE; if it belongs to model.path=/a, ",
        ),
    ],
)
def test_a_mixture_is_refused_with_what_to_type(overrides, told):
    with pytest.raises(InputError) as refused:
        settled(overrides)
    assert told in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_job_of_every_experiment_is_a_command_by_itself(experiment):
    whole = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text())
    params = whole["hydra"]["sweeper"]["params"]
    axes = [[f"{k}={v.strip()}" for v in str(values).split(",")] for k, values in params.items()]
    for job in itertools.product(*axes):
        arguments = [f"experiment={experiment}", *job, "hydra.mode=RUN"]
        assert settled(arguments) == arguments


def test_a_row_has_the_coding_of_its_variant():
    found = [(job.settings.label, job.settings.coding) for job in jobs(["timesteps=8"])]
    assert [(label, c.name) for label, c in found] == [
        *(("dense", "dense"), ("las", "las"), ("las_rounded", "las_rounded")),
        *(("multigrain", "multigrain"), ("gated2", "gated"), ("gated3", "gated")),
    ]
    assert {c.timesteps for _, c in found if c.converts} == {8}


def test_the_command_line_refuses_a_mixture_before_anything_runs(tiny_run, tmp_path):
    done = main_in(tmp_path, [*tiny_run.overrides, "coding=las", "variant=dense,gated2"])
    assert done.code == 1 and done.err.count("\n") == 1 and "both choose codings" in done.err
    assert not list(tmp_path.iterdir())


def test_no_two_configurations_share_a_file_name():
    def stem(*overrides: str) -> str:
        return naming.stem("quickstart", overrides, "tiny")

    circumstances = ("store.path=x", "runtime=offload", "+tracking.x=1", "experiment=quickstart")
    assert stem() == stem(*circumstances, "hydra.mode=RUN", "table.fill=true") == "quickstart"
    assert stem("timesteps=8") == "quickstart_timesteps=8"
    assert stem("model=llama2-7b", "variant=las,dense") == "quickstart_llama2-7b_variant=las+dense"
    assert stem("a=1", "b=2") == stem("b=2", "a=1") != stem("a=1", "b=3")
    folders = [stem(f"model.path=/{at}/model") for at in ("a", "b")]
    assert folders[0] != folders[1] and all(f.startswith("quickstart_tiny_") for f in folders)
    assert len({stem("label=a b"), stem("label=a-b"), stem("label=a_b"), stem("label='a'")}) == 4
    assert Path(stem("model=../x")).name == stem("model=../x")
