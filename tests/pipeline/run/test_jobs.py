"""The jobs of a command line, their steps before anything is built, and the plan of what is missing."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from pipeline.commands import plan
from pipeline.run import models, runner
from pipeline.run.chain import chain
from pipeline.run.jobs import jobs
from pipeline.store import manifest
from pipeline.store.store import Store
from tests.pipeline.conftest import Finished, main_in

SWEEP = ("experiment=none", "coding=las,gated", "timesteps=4,5", "evaluation.tasks=[piqa]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def swept(command, folder: Path) -> Finished:
    """A sweep over two axes, with questions."""
    return command(folder, "-m", *SWEEP)


def forbidden(*args, **kwargs):
    raise AssertionError("a plan loads and builds nothing")


def test_jobs_are_those_that_hydra_launches(swept, tiny_run):
    found = jobs([*tiny_run.overrides, *SWEEP])
    assert [sorted(job.overrides) for job in found] == [
        sorted(result["run"]["overrides"]) for result in swept.results
    ]
    assert [job.settings.name for job in found] == [r["label"] for r in swept.results]


def test_an_override_wins_over_the_axis_of_the_experiment():
    assert len(jobs(["experiment=frontier"])) == 18
    found = jobs(["experiment=frontier", "timesteps=9", "transform=rotate,none", "hydra.mode=RUN"])
    assert len(found) == 6
    assert {job.settings.timesteps for job in found} == {9}
    assert [job.settings.transform.name for job in found] == ["rotate"] * 3 + ["none"] * 3
    assert not any(override.startswith("hydra") for override in found[0].overrides)


def test_the_command_of_a_job_runs_that_job(swept, tiny_run, folder):
    job = jobs([*tiny_run.overrides, *SWEEP])[2]
    program, dash, module, *arguments = shlex.split(job.command)
    assert (program, dash, module) == ("python", "-m", "pipeline")
    (alone,) = main_in(folder, arguments).results
    assert alone["keys"] == swept.results[2]["keys"] and all(alone["hits"].values())
    odd = jobs(["experiment=frontier", "rows=dense"])[0]
    again = jobs([a for a in shlex.split(odd.command)[3:] if not a.startswith("hydra")])
    assert [job.config for job in again] == [odd.config] and odd.config.row == "dense"


def test_steps_have_the_keys_that_a_run_builds(swept, tiny_run, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for job, result in zip(jobs([*tiny_run.overrides, *SWEEP]), swept.results, strict=True):
        steps = chain(job.settings, Store(Path("elsewhere"))).steps
        assert {label: step.key() for label, step in steps.items()} == result["keys"]
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize("transform", ["rotate", "rotate_prefix"])
def test_the_keys_behind_a_prefix_are_known_before_it_is_found(transform, settings, tmp_path):
    chosen = settings(tmp_path, f"transform={transform}", "coding=gated_budget", "timesteps=4")
    steps = chain(chosen, Store(tmp_path)).steps
    expected = {label: step.key() for label, step in steps.items()}
    assert ("prefix" in expected) == (transform == "rotate_prefix")
    assert {"statistics sensitivity", "fitting", "energy"} <= set(expected)
    assert runner.execute(chosen)[0]["keys"] == expected


def test_a_stored_run_gives_its_row_without_loading_a_model(swept, tiny_run, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(models, "load", forbidden)
    job = jobs([*tiny_run.overrides, *SWEEP])[3]
    run, missing = runner.stored(job.settings)
    row, sites = run.collect()
    assert missing == [] and len(sites) == 21
    kept = {k: v for k, v in swept.results[3].items() if k not in ("run", "compiled", "hits")}
    assert json.loads(json.dumps({k: v for k, v in row.items() if k != "hits"})) == kept


def test_what_the_store_lacks_is_named(swept, tiny_run, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (job,) = jobs([*tiny_run.overrides, "experiment=none", "coding=gated", "timesteps=7"])
    run, missing = runner.stored(job.settings)
    assert missing == ["fitting", "patching", "evaluation ppl_wikipedia", "energy"]
    assert list(run.artifacts) == ["capture", "distribution", "evaluation dense ppl_wikipedia"]


def test_a_plan_counts_what_is_stored_and_shared(swept, tiny_run, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(models, "load", forbidden)
    overrides = [*tiny_run.overrides, "experiment=none", "coding=gated"]
    # T=4 is there but for other windows; T=7 is new; the third repeats the second
    chosen = [jobs([*overrides, t])[0] for t in ("timesteps=4", "timesteps=7", "timesteps=7")]
    store = Store(Path(chosen[0].settings.store.path))
    before = sorted(store.root.rglob("*"))
    first, second, third = plan.plan(chain(job.settings, store) for job in chosen)
    assert not first.builds and first.stored == 9  # six steps, the dense model, two texts
    assert list(second.builds) == ["fitting", "patching", "evaluation ppl_wikipedia", "energy"]
    assert not third.builds and third.shared == 4 and second.stored == third.stored == 5
    assert all(seconds is not None and seconds >= 0 for seconds in second.builds.values())
    assert sorted(store.root.rglob("*")) == before


def test_an_estimate_is_the_median_of_like_builds_by_their_tokens(settings, tmp_path):
    store = Store(tmp_path)
    steps = {}
    for windows, seconds in ((1, 1.0), (2, 6.0), (3, 6.0)):
        chosen = settings(tmp_path, "coding=las", f"evaluation.windows={windows}")
        step = steps[windows] = chain(chosen, store).steps["evaluation ppl_wikipedia"].step
        artifact = store.build(step, lambda out: (out / "x").write_text("x"))
        record = artifact.manifest | {"seconds": seconds}
        manifest.write(artifact.path, record)
    history = plan.History(store)  # 1, 3 and 2 seconds a window
    assert history.estimate(steps[3]) == (pytest.approx(6.0), True)
    other = chain(settings(tmp_path, "coding=gated"), store).steps  # of another coding
    assert history.estimate(other["evaluation ppl_wikipedia"].step) == (pytest.approx(6.0), True)
    assert history.estimate(other["capture"].step) == (None, True)
    half = chain(settings(tmp_path, "coding=las", "model.dtype=bfloat16"), store).steps
    borrowed = history.estimate(half["evaluation ppl_wikipedia"].step)
    assert borrowed == (pytest.approx(6.0), False)


def test_a_plan_on_the_command_line_runs_nothing(tiny_run, tmp_path):
    done = main_in(tmp_path, ["experiment=quickstart", *tiny_run.overrides, "runtime.plan=true"])
    assert done.code == 0, done.err
    assert len(re.findall(r"^ +\d+ ", done.out, re.MULTILINE)) == 6  # the quickstart's jobs
    assert "dense on tiny " in done.out and "gated3 T=6 n=3 on tiny " in done.out
    assert "by the dimensions of the model and the rates of two cores of an AMD EPYC" in done.out
    assert "no past build to estimate from: tokens wikipedia calibration" in done.out
    assert not (tmp_path / "outputs/store").exists() and not (tmp_path / "outputs/runs").exists()
    bad = main_in(tmp_path, ["runtime.plan=true", "coding=nonsense"])
    assert bad.code == 1 and bad.err.count("\n") == 1 and "nonsense" in bad.err


@pytest.mark.parametrize("store", [True, False])
def test_a_plan_refuses_a_place_that_a_run_would(store, tiny_run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    place = ["store.path=full/file"] if store else ["export.enabled=true", "export.folder=full"]
    for verb in (["plan"], []):
        done = main_in(tmp_path, [*verb, *tiny_run.overrides, "coding=las", *place])
        assert done.code == 1 and "full" in done.err.splitlines()[-1].rpartition(place[-1])[2]
        assert re.search(r"is not empty; give another|nothing can be written", done.err)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_a_sweeper_of_hydra_sweeps_too(tiny_run, tmp_path):
    sweep = ["coding=dense", "evaluation.windows=1,2", "hydra/sweeper=basic"]
    planned = main_in(tmp_path, ["plan", *tiny_run.overrides, *sweep])
    assert planned.code == 0 and "2 jobs" in planned.out, planned.err
    done = main_in(tmp_path, [*tiny_run.overrides, *sweep])
    assert done.code == 0, done.err
    assert [each["evaluation"]["wikipedia"]["windows"] for each in done.results] == [1, 2]


def test_a_plan_that_no_command_line_asks_for_runs_nothing_either(tiny_run, tmp_path):
    done = main_in(tmp_path, [*tiny_run.overrides, "experiment=none", "++runtime.plan=true"])
    assert done.code == 1 and "runtime.plan=true on the command line" in done.err
    assert not list(tmp_path.glob("outputs/store/*/*"))
