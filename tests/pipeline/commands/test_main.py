"""The command line, end to end on a tiny model: results, tables, tracking, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file, save_file

from pipeline.results.rows import under
from pipeline.run.shipped import choices
from tests.pipeline.conftest import Finished, Tiny, half_written, main_in

Command = Callable[..., Finished]
REPOSITORY = Path(__file__).parents[3]
MAIN = ("experiment=quickstart",)  # the default, but where a model is chosen
SINGLE = ("experiment=null", "coding=gated", "coding.timesteps=6", "coding.grains=2")
NAMES = ["model", "coding", "grains", "timesteps", "steps", "ppl_wikipedia", "nmse", "bound_db"]
PROFILES = choices("profile")
NAMES += ["spikes_per_value"]
NAMES += ["macs_G", "acs_G", "energy_J", "saving", "conversion_s"]
OPTIONAL = {"transform", "bits", "trained", "convention", "fitting_s"}  # where a row has one
OPTIONAL |= {"ratio_wikipedia", "environment"}
STAGES = ["capture", "distribution", "fitting", "patching"]
DENSE = "evaluation dense ppl_wikipedia"
ROWS = ["dense", "las", "las_rounded", "multigrain", "gated", "gated"]  # of the main job


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder and store for the runs that build on each other."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def quickstart(command: Command, folder: Path) -> Finished:
    """The main job as it is, on the tiny model, with questions and tracking."""
    return command(folder, *MAIN, "tracking.enabled=true", "evaluation.tasks=[piqa]")


@pytest.fixture(scope="module")
def single(command: Command, folder: Path, quickstart: Finished) -> Finished:
    """One of its conversions again, by itself and with pictures."""
    return command(folder, *SINGLE, "tracking.enabled=true", "runtime.figures=true")


def test_the_main_job_prints_and_writes_one_table_of_all_codings(quickstart):
    assert quickstart.code == 0, quickstart.err
    assert [result["coding"] for result in quickstart.results] == ROWS
    name = quickstart.table.stem  # after the experiment, the model and all that the run overrides
    assert re.fullmatch("quickstart_tiny_[0-9a-f]{8}", name)
    assert {path.name for path in quickstart.table.parent.iterdir()} == {
        f"{name}{part}.{suffix}"
        for part in ("", "_energy", "_roles")
        for suffix in ("md", "csv", "tex")
    }
    frame = pd.read_csv(quickstart.table)
    expected = [*NAMES[:6], "acc_piqa", *NAMES[6:], *under(PROFILES), "replicates"]
    expected += [f"ppl_wikipedia{ending}" for ending in ("_se", "_spread")]
    expected += [f"ratio_wikipedia{ending}" for ending in ("_low", "_high")]
    expected += [f"acc_piqa{ending}" for ending in ("_se", "_spread", "_n")]
    expected += [*(f"ratio_piqa{ending}" for ending in ("", "_low", "_high")), "changed_piqa"]
    assert [name for name in frame if name not in OPTIONAL] == expected
    assert frame["fitting_s"][1:].notna().all() and pd.isna(frame["fitting_s"][0])
    assert list(frame["coding"]) == ROWS and list(frame["grains"].dropna()) == [1, 1, 2, 2, 3]
    printed = re.findall(r"^tiny +(\w+)", quickstart.out, re.MULTILINE)
    assert printed == ROWS
    assert (frame["acc_piqa_n"] == 6).all()
    for result, ppl in zip(quickstart.results, frame["ppl_wikipedia"], strict=True):
        assert result["ppl_wikipedia"] == ppl


def test_the_dense_row_converts_nothing(quickstart):
    dense, *spiking = quickstart.results
    assert dense["nmse"] is None and dense["conversion_s"] is None
    assert (
        dense["saving"] == 0
        and dense["paper"]["saving"] == 0
        and dense["acs_G"] == pytest.approx(0, abs=1e-4)
    )
    assert not set(dense["seconds"]) & set(STAGES)
    assert all(0 < row["nmse"] < 1 and row["saving"] > 0 for row in spiking)


def test_the_dense_perplexity_is_that_of_the_plain_model(quickstart, tiny_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_run.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_run.model)
    lines = (tiny_run.folder / "evaluation.jsonl").read_text().splitlines()
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    ids = torch.tensor(tokenizer(text)["input_ids"])[: 3 * 48].view(3, 48)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss for row in ids]
    expected = float(torch.stack(losses).mean().exp())
    assert quickstart.results[0]["ppl_wikipedia"] == pytest.approx(expected, rel=1e-4)


def test_gated_neurons_come_closer_to_the_dense_model_than_one_range(quickstart):
    dense, *_, gated2, gated3 = (result["ppl_wikipedia"] for result in quickstart.results)
    assert gated2 == pytest.approx(dense, rel=0.02) and gated3 == pytest.approx(dense, rel=0.02)
    errors = [result["nmse"] for result in quickstart.results[1:]]
    assert errors[0] > 2 * errors[1] and errors[1] > 2 * errors[3] > 2 * errors[4]


def test_the_second_time_everything_is_cached_and_the_same(command, folder, quickstart):
    before = quickstart.table.read_bytes()
    again = command(folder, *MAIN, "evaluation.tasks=[piqa]")
    assert again.table == quickstart.table and again.table.read_bytes() == before
    for old, new in zip(quickstart.results, again.results, strict=True):
        assert all(new["hits"].values())
        moved = ("hits", "run", "compiled")
        assert {k: v for k, v in new.items() if k not in moved} == {
            k: v for k, v in old.items() if k not in moved
        }


def test_one_conversion_leaves_a_result_with_every_number(single, quickstart):
    assert single.code == 0, single.err
    (result,) = single.results
    assert set(NAMES) <= set(result) and None not in [result[name] for name in NAMES]
    stages = [*STAGES, "evaluation ppl_wikipedia", "energy", DENSE]
    for part in ("seconds", "hits", "keys"):
        assert list(result[part]) == stages
    assert all(seconds >= 0 for seconds in result["seconds"].values())
    assert set(result["paper"]) == {"macs_G", "acs_G", "energy_J", "saving", *under(PROFILES)}
    parts = pd.read_csv(single.runs / "0/energy_by_part.csv")
    own = parts[(parts["convention"] == "causal") & (parts["phase"] == "prefill")]
    sums = own.groupby("profile")["J"].sum(skipna=False)
    assert set(sums.index) == set(PROFILES) and result["breakeven_lemaire2022"] is not None
    for profile, joules in sums.items():
        assert result[f"energy_J_{profile}"] == pytest.approx(joules)
    sites = pd.read_parquet(single.runs / "0/per_site.parquet")
    assert len(sites) == 2 * 10 + 1 and sites[["nmse", "bound_db"]].notna().all(axis=None)
    assert re.search(r"^tiny +gated +6 +6 +2 ", single.out, re.MULTILINE)


def test_a_hit_shows_the_seconds_of_the_build(single, quickstart):
    (result,) = single.results
    assert all(result["hits"].values())
    built = quickstart.results[4]
    assert not built["hits"]["fitting"] and built["coding"] == "gated"
    assert result["seconds"].items() <= built["seconds"].items()
    seconds = [result["seconds"][stage] for stage in STAGES]
    assert result["conversion_s"] == pytest.approx(sum(seconds), abs=1e-3)


def test_batch_sizes_change_no_key(command, folder, single):
    sizes = ("runtime.batch=1", "runtime.evaluation_batch=3", "runtime.task_batch=2")
    (result,) = command(folder, *SINGLE, *sizes).results
    assert result["keys"] == single.results[0]["keys"] and all(result["hits"].values())


def test_other_batch_sizes_give_the_same_numbers_to_tolerance(command, tmp_path, single):
    sizes = ("runtime.batch=1", "runtime.evaluation_batch=3")
    (result,) = command(tmp_path, *SINGLE, *sizes).results
    assert not any(result["hits"].values())
    for name in NAMES[4:-1]:
        assert result[name] == pytest.approx(single.results[0][name], rel=1e-4)


def test_a_field_of_the_coding_changes_only_what_comes_after_fitting(command, folder, single):
    (result,) = command(folder, *SINGLE, "coding.timesteps=7").results
    kept, old = ["capture", "distribution", DENSE], single.results[0]["keys"]
    assert [stage for stage, hit in result["hits"].items() if hit] == kept
    assert [stage for stage, key in result["keys"].items() if key == old[stage]] == kept


def test_a_hardware_profile_changes_only_the_energy(command, folder, single):
    (result,) = command(folder, *SINGLE, "energy.profile.nm45.mac=9.2").results
    assert [stage for stage, hit in result["hits"].items() if not hit] == ["energy"]
    assert result["energy_J"] > single.results[0]["energy_J"]


def test_a_sweep_crosses_its_axes_in_one_table(command, folder, quickstart):
    sweep = command(folder, "-m", "experiment=null", "coding=las,gated", "coding.timesteps=4,6")
    assert sweep.code == 0, sweep.err
    rows = [(result["coding"], result["timesteps"]) for result in sweep.results]
    assert rows == [("las", 4), ("las", 6), ("gated", 4), ("gated", 6)]
    frame = pd.read_csv(sweep.table)
    assert list(zip(frame["coding"], frame["timesteps"], strict=True)) == rows
    assert len(re.findall("^model +coding ", sweep.out, re.MULTILINE)) == 1  # after all jobs
    assert sweep.results[1]["keys"]["fitting"] == quickstart.results[1]["keys"]["fitting"]


def test_a_failed_job_costs_the_sweep_no_other(command, folder, quickstart):
    sweep = command(folder, "-m", "experiment=null", "coding=las", "coding.timesteps=6,0")
    assert sweep.code == 1 and [result["timesteps"] for result in sweep.results] == [6]
    (line,) = sweep.err.splitlines()
    assert line.startswith("failed: ") and "coding.timesteps=0" in line


def test_a_figure_that_fails_costs_neither_the_table_nor_goes_unsaid(
    command, folder, quickstart, monkeypatch
):
    def broken(*args: object) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr("pipeline.commands.sweep.draw", broken)
    done = command(folder, "-m", "experiment=null", "coding=las,gated")
    assert done.code == 1 and done.err.splitlines() == ["failed: figures: ValueError: no ink"]
    assert len(pd.read_csv(done.table)) == 2


@pytest.fixture(scope="module")
def database(folder: Path, single: Finished) -> tuple[MlflowClient, list[Run]]:
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("spiking-llm")
    assert experiment is not None
    return client, list(client.search_runs([experiment.experiment_id]))


def test_the_database_holds_a_sweep_as_a_parent_with_its_jobs(database, quickstart):
    _, runs = database
    (parent,) = (run for run in runs if run.info.run_name.startswith("quickstart "))
    children = {
        re.sub(r" \w{6}/\d ", " ", run.info.run_name): run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert len(children) == len(ROWS)
    assert all(run.info.status == "FINISHED" for run in runs)
    gated, result = children["gated2 T=6 n=2 tiny"], quickstart.results[4]
    axes = {"model": "tiny", "coding": "gated", "grains": "2", "timesteps": "6"}
    assert axes.items() <= gated.data.params.items()
    for name in [*NAMES[4:], "acc_piqa"]:
        assert gated.data.metrics[name] == pytest.approx(result[name])
    for stage in result["seconds"]:
        assert gated.data.metrics[f"hits/{stage}"] == result["hits"][stage]
        assert gated.data.metrics[f"seconds/{stage}"] == result["seconds"][stage]


def test_a_run_is_logged_with_its_per_site_table_and_its_pictures(database, tmp_path):
    client, runs = database
    (run,) = (run for run in runs if run.info.run_name.startswith("gated T=6 n=2 "))
    assert "mlflow.parentRunId" not in run.data.tags
    table = client.download_artifacts(run.info.run_id, "per_site.json", str(tmp_path))
    sites = pd.read_json(table, orient="split")
    assert len(sites) == 21 and {"site", "role", "spikes", "nmse"} <= set(sites)
    pictures = {Path(f.path).stem for f in client.list_artifacts(run.info.run_id, "figures")}
    assert pictures == {"density_and_levels", "error_per_layer", "spike_rate_per_layer"}


# What is refused: (overrides, what the line names). Every file is made by `broken`.
REFUSED = {
    "key": (["coding.timestep=6"], "coding.timestep"),
    "option": (["coding=fancy"], "no such choice; choose among compander"),
    "timesteps": (["coding.timesteps=0"], "coding.timesteps=0"),
    "grains": (["coding=multigrain", "coding.grains=4", "coding.timesteps=3"], "coding.grains=4"),
    "empty": (["corpus.wikipedia.calibration_path={broken}/empty.jsonl"], "0 tokens"),
    "short": (["corpus.wikipedia.calibration_path={broken}/short.jsonl"], "need 192"),
    "held out": (["patching.windows=500"], "500 windows"),
    "short evaluation": (["corpus.wikipedia.path={broken}/empty.jsonl"], "0 tokens"),
    "nan": (["model.path={broken}/nan"], "nan, inf"),
    "overflow": (["model.path={broken}/overflow"], "nan, inf"),
    "constant": (["model.path={broken}/constant"], "layers.1.mlp.up_proj:out (0), "),
    "no config": (["model.path={broken}/no_config"], "no config.json"),
    "garbage": (["model.path={broken}/garbage"], "cannot be loaded"),
    "pickle": (["model.path={broken}/pickle"], "no *.safetensors"),
    "no folder": (["model.path={broken}/nowhere"], "is not a folder"),
    "same file": (["corpus.wikipedia.path={broken}/calibration.jsonl"], "both"),
    "same text": (["corpus.wikipedia.path={broken}/copy.jsonl"], "in the calibration and in"),
    "no text": (["corpus.wikipedia.path={broken}/nowhere.jsonl"], "does not exist"),
    "corpus": (["evaluation.corpora=[wiki]"], "wikipedia, wikitext2"),
    "task": (["evaluation.tasks=[piqq]"], "arc_easy"),
    "tracking": (["tracking.uri=file:{broken}/mlruns", "tracking.enabled=true"], "sqlite:///"),
}


@pytest.fixture(scope="module")
def broken(tiny_run: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and texts with one fault each."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty.jsonl").write_text("")
    (folder / "short.jsonl").write_text(json.dumps({"text": "too short"}) + "\n")
    for name in ("calibration", "copy"):
        shutil.copy(tiny_run.folder / "calibration.jsonl", folder / f"{name}.jsonl")
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
    for name, weight, value in (
        ("nan", up, float("nan")),
        ("overflow", norm, 3e38),
        ("constant", up, 0.0),
    ):
        file = shutil.copytree(tiny_run.model, folder / name) / "model.safetensors"
        weights = load_file(file)
        weights[weight].fill_(value)
        save_file(weights, file, {"format": "pt"})
    no_config = shutil.copytree(tiny_run.model, folder / "no_config")
    (no_config / "config.json").unlink()
    garbage = shutil.copytree(tiny_run.model, folder / "garbage") / "model.safetensors"
    garbage.write_bytes(b"\x00garbage" * 100)
    pickle = shutil.copytree(tiny_run.model, folder / "pickle")
    torch.save(load_file(pickle / "model.safetensors"), pickle / "pytorch_model.bin")
    (pickle / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing_half_written(case, broken, tiny_run, tmp_path):
    overrides, named = REFUSED[case]
    own = [f"corpus.wikipedia.calibration_path={broken}/calibration.jsonl"]
    given = [override.format(broken=broken) for override in overrides]
    done = main_in(tmp_path, ["experiment=null", *tiny_run.overrides, *own, *given])
    lines = done.err.splitlines()
    assert done.code == 1 and len(lines) == 1, done.err
    said = lines[0].partition(f"{given[-1]}: ")[2] or lines[0]  # after the job's overrides
    assert re.match("(error|failed): ", lines[0]) and named in said, lines
    assert "Traceback" not in done.out + done.err
    assert not half_written(tmp_path / "outputs/store")
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.slow
def test_a_process_of_its_own_says_the_same_and_nothing_else(tiny_run, tmp_path):
    """A job that is refused, which is one line, and one that is not."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    environment.pop("PIPELINE_RUN_ID", None)
    command = [sys.executable, "-m", "pipeline", *tiny_run.overrides]
    done = subprocess.run(
        [*command, "-m", "experiment=null", "coding.timesteps=0,5"],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True},
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.match(r"failed: .*coding\.timesteps=0: ", done.stderr)
    assert re.findall(r"^tiny +gated +(\d) +5 +2 ", done.stdout, re.MULTILINE) == ["5"]
