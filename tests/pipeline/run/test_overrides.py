"""One conversion or an experiment, never a mixture: rows are what their names say."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException

from pipeline.results import naming
from pipeline.run import axes, shipped
from pipeline.run.errors import one_line
from pipeline.run.jobs import command as command_of
from pipeline.run.jobs import jobs
from pipeline.run.overrides import launched, settled, shown
from stages.errors import InputError
from tests.pipeline.conftest import CONF, main_in

EXPERIMENTS = sorted({path.stem for path in (CONF / "experiment").glob("*.yaml")} - {"none"})


def named(*overrides: str) -> list[str]:
    return [job.settings.name for job in jobs(overrides)]


def test_without_an_override_of_a_conversion_it_is_the_experiment():
    assert settled([]) == [] and settled(["timesteps=8"]) == ["timesteps=8"]
    assert settled(["experiment=null"]) == ["experiment=none"]
    assert settled(["timesteps=8"], "codings") == ["timesteps=8", "experiment=codings"]
    assert settled(["--cfg", "job", "-m"]) == ["--cfg", "job", "-m"]
    assert len(jobs([])) == 6


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["coding=multigrain"], ["multigrain T=6 n=2"]),
        (["coding=las", "timesteps=8"], ["las T=8 n=1"]),
        (["coding.timesteps=7"], ["gated T=7 n=2"]),
        (["row=mine"], ["mine T=6 n=2"]),
        (["row=gated3", "coding=gated", "coding.grains=3"], ["gated3 T=6 n=3"]),
        (["row=gated"], ["gated T=6 n=2"]),
        (["coding=las,gated", "timesteps=4,5"], ["las T=4 n=1", "las T=5 n=1"]),
        (["model=llama2-7b"], ["gated T=6 n=2"]),
        (["model.dtype=bfloat16"], ["gated T=6 n=2"]),
        (["transform=rotate"], ["gated T=6 n=2 rotate"]),
    ],
)
def test_an_override_of_a_conversion_is_one_or_a_sweep_of_what_it_lists(overrides, names):
    assert named(*overrides)[:2] == names
    assert len(named(*overrides)) == (4 if "," in overrides[0] else 1)
    again = settled(settled(overrides))  # settled twice is settled once
    assert again == settled(overrides) and "experiment=none" in again
    assert ("hydra.mode=MULTIRUN" in again) == ("," in overrides[0])


def test_a_table_of_another_model_or_transform_is_still_a_table_of_its_experiment():
    for override in ("model=llama2-7b", "transform=rotate", "rows=las"):
        assert "experiment=codings" in settled([override], "codings")
    assert "experiment=none" in settled(["coding=las"], "codings")


def test_rows_are_chosen_by_name_in_the_order_that_is_given():
    assert named("rows=gated2,dense", "timesteps=5") == ["gated2 T=5 n=2", "dense"]
    chosen = ("experiment=codings", "rows=gated2", "timesteps=6", "transform=none")
    assert named(*chosen) == ["gated2 T=6 n=2"]
    (job,) = jobs(chosen)
    assert "row=gated2" in job.overrides and "coding=gated" not in job.overrides


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["coding=multigrain", "rows=dense,gated2"], "codings; give rows=multigrain inst"),
        (["coding=gated", "rows=dense,gated2"], "coding=gated: the rows of an experiment have"),
        (["experiment=codings", "coding=gated"], "give rows=gated2,gated3,gated2_offset instead"),
        (["experiment=codings", "coding=gif_smoothed"], "choose rows=NAME instead, or leave"),
        (["rows=gated2", "coding.grains=3"], "gated2 sets it already. Give coding=NAME coding.gr"),
        (["rows=gatd2"], "rows=gatd2: no such row; did you mean gated2 or gated3? Choose among de"),
        (["experiment=paper", "row=las,zzz"], "no such row; the experiment has dense, las, paper2"),
        (["rows=glob(gated*)"], "row=glob(gated*): give the values, as row=A,B or"),
        (["rows=las,gated2", "hydra.mode=RUN"], "a run by itself has one row"),
        (
            ["variant=las,gated2"],
            "variant=las,gated2: no such option; the rows of an experiment are",
        ),
        (["variant=las,gated2"], "are chosen by rows=las,gated2"),
        (["~variant"], "chosen by rows=NAME"),
        (["label=x"], "the name of a conversion is row=x"),
        (["~row"], "~row: leave it out instead"),
        (["~coding"], "~coding: nothing runs without one; give coding=NAME, out of compander"),
        (["~transform"], "give transform=NAME, out of fuse, none, rotate"),
        (["row=gated3", "model.path=/a"], "options, coding=gated coding.grains=3, or this one an"),
        (["row=gated2", "coding=multigrain,las"], "gated2 is the name of another conversion"),
        (["row='oat'", "coding=las"], "give its options, coding=oat, or"),
        (["row=mine,las", "coding=gated"], "las is the name of another conversion"),
        (["coding=multigrain", "~coding.algorithm1"], "give coding.algorithm1=VALUE"),
        (["hydra.output_subdir=null"], "choose the folder by hydra.run.dir=FOLDER"),
        (
            ["experiment=quickstart", "coding.grains=4"],
            "gated2, gated3 set it already. Give rows=dense,las,las_rounded,multigrain beside it, or",
        ),
        (
            ["experiment=algorithm1", "coding.algorithm1.neuron_lr=1"],
            "eta1_1e-4, eta1_1e-2 set it",
        ),
        (["experiment=calibration_ablation", "calibration=paper"], "sets calibration.length, cal"),
        (["experiment=quickstart", "row=x"], "rows=x: no such row; the experiment has dense, las"),
        (["coding=null"], "coding=null: give one name, out of compander, dense"),
        (["profile=45nm"], "profile=45nm: give a list, profile=[NAME,NAME], out of 45nm, "),
        (["profile=45nm,loihi"], "profile=45nm,loihi: give a list, profile=[NAME,NAME], out of"),
        (["profile=[]"], "profile=[]: give a list, profile=[NAME,NAME], out of 45nm, "),
        (
            ["profile=[45nm,lemaire]"],
            "profile=[45nm,lemaire]: no such profile; did you mean lemaire2022?",
        ),
        (["experiment=codings,frontier"], "give one experiment a command"),
        (
            ["model.path=/a", "b"],
            "b: options are given as KEY=VALUE; if it belongs to model.path=/a, ",
        ),
    ],
)
def test_a_mixture_is_refused_with_what_to_type(overrides, message):
    with pytest.raises(InputError) as refused:
        settled(overrides)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_two_profiles_of_one_key_are_refused_before_they_are_mixed(tmp_path):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    assert settled(["profile=[loihi,45nm]"], conf=conf)
    text = (conf / "profile" / "45nm.yaml").read_text()
    (conf / "profile" / "mine.yaml").write_text(text.replace("name: 45nm", "name: mine"))
    with pytest.raises(InputError, match="mine.yaml: nm45 is the key of 45nm.yaml too"):
        settled(["profile=[45nm,mine]"], conf=conf)


def test_what_is_spelled_for_hydra_is_shown_as_it_is_typed():
    typed = ["coding=gated", "corpus.mine.path=a.txt", "evaluation.corpora=[mine]"]
    spelled = settled(typed)
    assert spelled != typed and "experiment=none" in spelled
    assert shown(spelled) == typed


@pytest.mark.parametrize("params", ["variant=las", "row=las"])
def test_an_axis_of_hydra_beside_the_coding_is_no_traceback(params, tiny_run, tmp_path):
    axis = f"+hydra.sweeper.params.{params}"
    done = main_in(tmp_path, ["experiment=quickstart", *tiny_run.overrides, "coding=las", axis])
    assert done.code == 1 and done.err.count("\n") == 1 and "have their codings" in done.err


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_job_of_every_experiment_is_a_command_by_itself(experiment):
    """The overrides as they are recorded, with hydra.mode=RUN, give Hydra that job and no other."""
    of = shipped.experiment(experiment)
    coding = of.coding or shipped.default("coding")
    sweep = axes.swept([], of.params, of.rows, coding)
    assert len({job.all for job in sweep.jobs}) == len(sweep.jobs) > 0
    for job in sweep.jobs:
        arguments = [f"experiment={experiment}", *job.typed, "hydra.mode=RUN"]
        assert settled(arguments) == [*arguments, *job.row]
        assert axes.typed(job.all, of.rows) == [*job.typed]


def test_a_row_is_named_and_coded_as_its_experiment_says():
    settings = [job.settings for job in jobs(["timesteps=8"])]
    assert [(each.row, each.coding.name) for each in settings] == [
        *(("dense", "dense"), ("las", "las"), ("las_rounded", "las_rounded")),
        *(("multigrain", "multigrain"), ("gated2", "gated"), ("gated3", "gated")),
    ]
    codings = [each.coding for each in settings]
    assert {c.timesteps for c in codings if c.converts} == {8}


def reached(*overrides: str) -> tuple[list[str], list[tuple[int, ...]]]:
    """The codings of the jobs, and the grains and steps of those that have any."""
    codings = [job.settings.coding for job in jobs(overrides)]
    spiking = [c for c in codings if c.converts]
    return [c.name for c in codings], [(c.grains, c.timesteps) for c in spiking]


def test_an_option_reaches_the_codings_that_have_it_and_a_line_says_which(caplog):
    caplog.set_level("INFO", "pipeline")
    names, counts = reached("coding=dense,las,gated", "coding.grains=3")
    assert names == ["dense", "las", "gated"] and counts == [(1, 6), (3, 6)]
    assert caplog.messages == ["coding.grains=3 reaches gated; dense, las have no grains"]
    # an axis of it crosses those alone: the others have one row
    names, counts = reached("coding=dense,las,gated", "coding.grains=2,3", "timesteps=4")
    assert names == ["dense", "las", "gated", "gated"] and counts == [(1, 4), (2, 4), (3, 4)]
    caplog.clear()
    # the coding of conf/config.yaml has no v0: what all chosen ones have is no option of some
    assert reached("coding=las,oat", "coding.v0=zero")[0] == ["las", "oat"]
    assert not caplog.messages


def test_an_option_reaches_the_rows_that_have_it(caplog):
    caplog.set_level("INFO", "pipeline")
    chosen = jobs(["experiment=quickstart", "coding.timesteps=8"])
    assert {job.settings.coding.timesteps for job in chosen[1:]} == {8} and len(chosen) == 6
    (message,) = caplog.messages
    assert message.startswith("coding.timesteps=8 reaches las, las_rounded, multigrain, gated2, ga")
    assert message.endswith("; dense has no timesteps")


def test_an_option_that_no_chosen_coding_has_is_refused():
    for chosen in (["coding=dense,las"], ["rows=dense,las"], ["coding=las"]):
        with pytest.raises(HydraException) as refused:
            jobs([*chosen, "coding.grains=3"])
        line = one_line(refused.value)
        assert "has no grains, free_steps, gated, " in line and "\n" not in line
    with pytest.raises(HydraException) as refused:
        jobs(["coding=las,gated", "coding.timestep=3"])
    assert "did you mean coding.timesteps" in one_line(refused.value)


def test_a_spread_option_is_a_plain_job_of_hydra(command, tmp_path):
    done = command(tmp_path, "coding=dense,gated", "coding.grains=3", "timesteps=4")
    assert done.code == 0, done.err
    assert "coding.grains=3 reaches gated; dense has no grains" in done.out
    rows = [(result["row"], result["coding"], result["grains"]) for result in done.results]
    assert rows == [("dense", "dense", None), ("gated", "gated", 3)]
    recorded = [yaml.safe_load((done.runs / n / ".hydra/overrides.yaml").read_text()) for n in "01"]
    assert ["coding.grains=3" in each for each in recorded] == [False, True]
    assert [result["run"]["overrides"] for result in done.results] == recorded
    swept = yaml.safe_load((done.runs / "multirun.yaml").read_text())["hydra"]["overrides"]["task"]
    assert {"coding=dense,gated", "coding.grains=3"} <= {*swept}  # the name of the table has these
    again = command(tmp_path, "row=mine", "coding=gated", "coding.grains=3", "timesteps=4")
    assert again.table.stem.startswith("mine_")


def test_the_jobs_of_rows_are_recorded_by_name_and_whole(command, tmp_path):
    done = command(tmp_path, "experiment=quickstart", "rows=gated3,dense")
    assert done.code == 0, done.err
    whole = yaml.safe_load((done.runs / "0/.hydra/overrides.yaml").read_text())
    assert {"row=gated3", "coding=gated", "coding.grains=3"} <= {*whole}
    assert yaml.safe_load((done.runs / "0/.hydra/config.yaml").read_text())["coding"]["grains"] == 3
    result = done.results[0]
    assert result["row"] == "gated3" and "coding=gated" not in result["run"]["overrides"]
    words = ["python", "-m", "pipeline", *result["run"]["overrides"], "hydra.mode=RUN"]
    assert command_of(result["run"]["overrides"]) == shlex.join(words)
    (alone,) = main_in(tmp_path, words[3:]).results
    assert alone["keys"] == result["keys"] and alone["row"] == "gated3"
    assert alone["run"]["overrides"] == result["run"]["overrides"]


def test_the_command_line_refuses_a_mixture_before_anything_runs(tiny_run, tmp_path):
    done = main_in(tmp_path, [*tiny_run.overrides, "coding=las", "rows=dense,gated2"])
    assert done.code == 1 and done.err.count("\n") == 1 and "have their codings" in done.err
    assert not list(tmp_path.iterdir())


def test_no_two_configurations_share_a_file_name():
    def stem(*overrides: str) -> str:
        return naming.stem("quickstart", overrides, "tiny")

    circumstances = ("store.path=x", "runtime=offload", "+tracking.x=1", "experiment=quickstart")
    assert stem() == stem(*circumstances, "hydra.mode=RUN", "table.fill=true") == "quickstart"
    assert stem("timesteps=8") == "quickstart_timesteps=8"
    assert stem("model=llama2-7b", "row=las,dense") == "quickstart_llama2-7b_row=las+dense"
    assert stem("a=1", "b=2") == stem("b=2", "a=1") != stem("a=1", "b=3")
    folders = [stem(f"model.path=/{at}/model") for at in ("a", "b")]
    assert folders[0] != folders[1] and all(f.startswith("quickstart_tiny_") for f in folders)
    assert len({stem("row=a b"), stem("row=a-b"), stem("row=a_b"), stem("row='a'")}) == 4
    assert Path(stem("model=../x")).name == stem("model=../x")


@pytest.mark.parametrize("sweep", ["coding=dense,gated", "timesteps=4,5", "coding=choice(las,oat)"])
def test_a_sweep_that_cannot_be_composed_says_why_and_not_that_it_has_commas(sweep, tmp_path):
    done = main_in(tmp_path, [sweep, "codin.grains=2"])
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: unknown config key codin") and done.err.count("\n") == 1


def test_hydra_is_told_of_a_sweep_and_of_nothing_else():
    for typed in ([], ["coding=las"], ["timesteps=4,5", "hydra.mode=RUN"], ["timesteps=4,5", "-m"]):
        assert launched(typed) == typed
    assert launched(["timesteps=4,5"]) == ["timesteps=4,5", "--multirun"]
