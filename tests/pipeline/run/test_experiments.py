"""Every experiment: its jobs are sound, and a cut of its sweep runs end to end on the tiny model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig

from pipeline.results.rows import sweep_results
from pipeline.run import shipped
from pipeline.run.axes import swept
from pipeline.run.overrides import spelled
from tests.pipeline.composing import COMPOSER, composing
from tests.pipeline.conftest import CONF, Finished

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
MAIN = (
    "dense,integer4,integer,gif,ttfs,one_spike,two_spike,las,oat_rounded,phase,paper2,paper3,gated2,\
gated3,gated_budget,signed_digit2"
)
# What the smoke run takes of an axis where that is not its first two values.
CUT = {
    "codings": {"rows": "dense,ttfs,oat_rounded,gated2,gated2_offset"},
    "frontier": {"timesteps": "4", "evaluation.corpora": "[wikipedia]"},
    "spikes": {"evaluation.corpora": "[wikipedia]", "rows": "dense,spikes_a,spikes_c"},
    "time_price": {"evaluation.corpora": "[wikipedia]", "rows": "timed_128"},
    "spike_price": {"evaluation.corpora": "[wikipedia]"},
    "compander": {"timesteps": "4"},
    "algorithm1": {"rows": "algorithm1,n1_5,slope_5,slope_80,samples_1000"},
    "decoupling": {
        "timesteps": "6",
        "rows": "learn_neither,learn_neuron,learn_bases,learn_both",
    },
    "paper": {"timesteps": "6", "rows": "dense,las,paper2,paper3"},
    "grain_timestep": {"timesteps": "6", "rows": "dense,multigrain1,multigrain2,gated1,gated3"},
    "main_table": {"timesteps": "6", "rows": MAIN},
    "convergence": {"coding.algorithm1.rounds": "3"},
    "energy_table": {"timesteps": "6", "rows": "dense,integer,paper2"},
    "energy_models": {"energy.tokens": "16,32", "rows": "dense,integer8,gated2"},
    "calibration_ablation": {"calibration.windows": "4,8", "fitting.samples": "500"},
    "v0_ablation": {"timesteps": "6", "rows": "las,phase,multigrain2"},
}
# Cuts of few jobs: between them a bound, the paper's setting and training, all tables and the figures of
# a sweep. The other cuts are slow.
QUICK = ("compander", "convergence", "energy_table")
CUTS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in EXPERIMENTS
    if name != "none"
]
Command = Callable[..., Finished]


@functools.cache
def axes(experiment: str) -> dict[str, list[str]]:
    with composing():
        whole = compose("config", [f"experiment={experiment}"], return_hydra_config=True)
    sweeper = whole.hydra.sweeper
    values = {name: str(value).split(",") for name, value in sweeper.params.items()}
    return values | {"rows": [*sweeper.rows]} if sweeper.rows else values


@functools.cache
def composed(experiment: str, **choice: str) -> DictConfig:
    of, given = shipped.experiment(experiment), spelled([f"{k}={v}" for k, v in choice.items()])
    (job,) = swept(given, of.params, of.rows, "gated").jobs
    with composing():
        return COMPOSER([f"experiment={experiment}", *job.all])


def at(experiment: str, **choice: str) -> Any:
    """Settings at the first value of every axis that is not chosen; many tests share their composing."""
    first = {name: values[0] for name, values in axes(experiment).items()}
    return instantiate(composed(experiment, **first | choice))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_value_of_every_axis_becomes_settings(experiment):
    found = axes(experiment)
    names = []
    for name, values in found.items():
        assert len(set(values)) == len(values)
        for value in values:
            settings = at(experiment, **{name: value})
            names += [settings.row] if name == "rows" else []
    assert names == found.get("rows", [])


def test_every_coding_runs_at_every_number_of_steps():
    found = axes("codings")
    assert found["timesteps"] == ["4", "5", "6", "8", "10"]
    assert found["transform"] == ["none", "rotate"]
    codings = set()
    for name, steps in itertools.product(found["rows"], ("4", "10")):
        coding = at("codings", rows=name, timesteps=steps).coding
        assert not coding.converts or coding.timesteps in (int(steps), 32, 128)
        codings.add(coding.name)
    # SpikeLLM's smoothing trains for hours and is asked for by name.
    known = {path.stem for path in (CONF / "coding").glob("*.yaml")} - {"gif_smoothed"}
    assert codings == known


def test_oat_rounded_stands_beside_the_gated_rows():
    names = axes("codings")["rows"]
    gated = [i for i, name in enumerate(names) if name.startswith("gated")]
    start = names.index("oat_rounded") + 1
    assert gated == list(range(start, start + len(gated))) and len(gated) >= 2
    assert list(axes("codings")) == ["transform", "timesteps", "rows"]  # which vary fastest


def test_decoupling_learns_what_its_rows_say_in_equal_steps():
    learnt = {}
    for name in axes("decoupling")["rows"]:
        settings = at("decoupling", rows=name)
        steps = getattr(settings.coding, "algorithm1", None)
        learnt[name] = (steps.neuron_steps, steps.base_steps) if steps else (0, 0)
    assert [tuple(map(bool, pair)) for pair in learnt.values()] == [
        *((False, False), (True, False), (False, True), (True, True))
    ]
    assert len({sum(pair) for pair in list(learnt.values())[1:]}) == 1


def test_algorithm1_varies_one_setting_at_a_time():
    whole = [at("algorithm1", rows=name) for name in axes("algorithm1")["rows"]]
    base, *others = [vars(s.fitting) | vars(s.coding.algorithm1) for s in whole]
    alike = [replace(s.coding, algorithm1=whole[0].coding.algorithm1) for s in whole]
    assert len({*alike}) == 1
    changed = [{name for name in base if fields[name] != base[name]} for fields in others]
    names = {"neuron_steps", "base_steps", "neuron_lr", "base_lr", "slope"}
    assert all(len(one) == 1 or one <= {"data", "samples"} for one in changed)
    assert set().union(*changed) == names | {"data", "samples"}


@pytest.mark.parametrize("experiment", ["paper", "main_table", "energy_table"])
def test_the_papers_setting_is_the_papers(experiment):
    for steps, grains in itertools.product(axes(experiment)["timesteps"], (2, 3)):
        settings = at(experiment, timesteps=steps, rows=f"paper{grains}")
        assert (settings.calibration.windows, settings.calibration.length) == (64, 512)
        assert "mlp.up" not in settings.sites.roles and "head.in" in settings.sites.roles
        assert settings.transform.name == "rotate_prefix"
        coding = settings.coding
        assert (coding.name, coding.grains, coding.tau) == ("multigrain", grains, "running_maximum")
        units = "absolute" if experiment == "paper" else "relative"
        assert (coding.algorithm1.slope, coding.algorithm1.slope_units) == (10, units)
    assert axes(experiment)["timesteps"] == ["6", "8", "10"]


def test_the_grid_of_grains_and_timesteps_is_complete():
    found = axes("grain_timestep")
    grid = []
    for steps, name in itertools.product(found["timesteps"], found["rows"]):
        coding = at("grain_timestep", timesteps=steps, rows=name).coding
        if coding.converts:
            grid.append((coding.name, coding.grains, coding.timesteps))
    assert sorted(grid) == sorted(itertools.product(("multigrain", "gated"), (1, 2, 3), (6, 8, 10)))


def test_the_main_table_has_every_method_once_and_the_energy_table_shares_its_evaluations():
    whole = axes("main_table")["rows"]
    assert whole == MAIN.split(",")
    codings = [at("main_table", rows=name).coding for name in whole]
    assert len(set(codings)) == len(codings)
    assert set(axes("energy_table")["rows"]) <= set(whole)
    one, other = (at(name, rows="gated2") for name in ("main_table", "energy_table"))
    tasks = one.evaluation.tasks
    assert (
        tasks == ("piqa", "arc_easy", "winogrande", "arc_challenge") and not other.evaluation.tasks
    )
    silent = {"tasks": tasks, "items": one.evaluation.items}
    assert replace(other, evaluation=replace(other.evaluation, **silent)) == one


def test_what_the_results_are_measured_by_has_three_replicates():
    for name in ("algorithm1", "codings", "compander", "decoupling", "frontier", "paper"):
        assert at(name, **{k: v[0] for k, v in axes(name).items()}).evaluation.replicates >= 3
    headline = at("frontier", rows="gated_budget").evaluation
    assert headline.windows >= 64 and headline.length >= 1024


def test_v0_is_all_that_the_rows_of_its_ablation_differ_in():
    found = axes("v0_ablation")
    assert found["rows"] == ["las", "phase", "multigrain2"]
    assert found["coding.v0"] == ["zero", "half_step"]
    for steps, name in itertools.product(found["timesteps"], found["rows"]):
        zero, half = (
            at("v0_ablation", timesteps=steps, rows=name, **{"coding.v0": v0})
            for v0 in found["coding.v0"]
        )
        assert (zero.coding.v0, half.coding.v0) == ("zero", "half_step")
        assert replace(zero, coding=replace(zero.coding, v0="half_step")) == half


def test_calibration_varies_its_tokens_its_corpus_and_the_seed():
    found = axes("calibration_ablation")
    assert found["calibration.windows"] == ["4", "16", "64"] and "calibration.corpus" in found
    assert found["rows"] == ["multigrain2", "gated2"] and len(found["fitting.seed"]) >= 3
    for corpus in ("wikipedia", "c4"):  # whatever text a user names
        given = {"calibration.corpus": corpus, "calibration.windows": "4", "fitting.seed": "1"}
        settings = at("calibration_ablation", rows="multigrain2", **given)
        calibration = settings.calibration
        assert (calibration.corpus, calibration.windows, calibration.length) == (corpus, 4, 512)
        # A seed only matters where values are drawn.
        assert (settings.fitting.data, settings.fitting.seed) == ("samples", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all, as a user has it."""
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.parametrize("experiment", CUTS)
def test_a_cut_of_every_experiment_runs(experiment, folder, command: Command):
    first = {name: ",".join(values[:2]) for name, values in axes(experiment).items()}
    once = {} if experiment == "compander" else {"evaluation.replicates": "1"}  # its three in one
    cut = [f"{k}={v}" for k, v in (first | once | CUT.get(experiment, {})).items()]
    done = command(folder, f"experiment={experiment}", "runtime.figures=true", *cut)
    assert done.code == 0, done.err
    tables, name = done.table.parent, done.table.stem
    assert name.startswith(f"{experiment}_tiny_")
    frame = pd.read_csv(done.table)
    assert not frame.drop(columns=["fitting_s", "conversion_s"]).duplicated().any()
    assert frame["ppl_wikipedia"].gt(1).all() and frame["ppl_wikipedia_se"].gt(0).all()
    assert frame["ppl_wikipedia_spread"].notna().all() == (experiment == "compander")
    assert {f"{name}_error_per_layer.{kind}" for kind in ("png", "pdf")} <= {
        path.name for path in tables.glob("*")
    }
    written = {path.name.removeprefix(name) for path in tables.glob(f"{name}*")}
    expected = {f"{part}.{kind}" for part in ("", "_energy") for kind in ("md", "csv", "tex")}
    if experiment != "compander":  # a bound has no spikes, so no energy
        expected |= {"_ppl_energy.png", "_ppl_energy.pdf"}
    assert expected <= written
    check_roles(pd.read_csv(tables / f"{name}_roles.csv"), frame)
    assert ("_quantiles.md" in written) == (experiment == "compander")
    assert ("_convergence.md" in written) == (experiment in ("algorithm1", "convergence"))
    if experiment == "codings":
        assert {"_ppl_timesteps.pdf", "_levels.pdf"} <= written
        check_codings(done, frame)
    if experiment == "compander":
        check_quantiles(frame, pd.read_csv(tables / f"{name}_quantiles.csv"))
    if experiment == "spike_price":  # rows that only the price tells apart
        assert sorted(frame["setting"].unique()) == ["mu=0.02", "mu=0.05"]
    if experiment == "v0_ablation":
        check_v0(frame)
    if experiment == "calibration_ablation":
        check_calibration(done)
    if experiment == "energy_models":
        assert {"_saving_spikes.png", "_energy_parts.pdf"} <= written
        check_models(done, frame)
    if experiment == "algorithm1":
        check_convergence(pd.read_csv(tables / f"{name}_convergence.csv"))


def check_models(done: Finished, frame: pd.DataFrame) -> None:
    """A row a prompt's length; what it would cost on other dimensions, and a table of all of it."""
    results = [*sweep_results(done.runs).values()]
    assert [result["row"] for result in results] == ["dense", "integer8", "gated2"] * 2
    assert [sorted(result["models"]) for result in results] == [["llama3-8b"]] * 6
    for result, costs in ((each, each["models"]["llama3-8b"]["causal"]) for each in results):
        assert costs["prefill"]["macs_G"] > 1e3 * (result["macs_G"] or 0)
    for name in ("45nm", "lemaire2022", "streamed"):
        dense, integers, spiking = (frame[f"saving_{name}"][row] for row in range(3))
        assert dense == 0 and integers > -0.01 and spiking < 1
    assert frame["saving_loihi"].isna().all() and frame["energy_J_loihi"].notna().sum() == 2


def check_codings(done: Finished, frame: pd.DataFrame) -> None:
    names = [result["row"] for result in sweep_results(done.runs).values()]
    assert names == CUT["codings"]["rows"].split(",") * 4
    # dense and ttfs know no other T: one row a transform, where the sweep has two
    counts = frame["coding"].value_counts()
    assert counts["dense"] == counts["ttfs"] == 2 and counts["oat_rounded"] == 4
    at = {name: list(frame.index[frame["row"] == name]) for name in ("oat_rounded", "gated2")}
    assert [i + 1 for i in at["oat_rounded"]] == at["gated2"]
    together = frame.loc[at["gated2"], ["timesteps", "transform"]].to_numpy()
    assert (frame.loc[at["oat_rounded"], ["timesteps", "transform"]].to_numpy() == together).all()


def check_v0(frame: pd.DataFrame) -> None:
    """Half a step of v0 rounds: a quarter of the squared error of base 2 for well filled steps."""
    assert len(frame) == 6 and set(frame["setting"]) == {"v0=zero", "v0=half_step"}
    error = frame.pivot(index="coding", columns="setting", values="nmse")
    assert error.loc["las", "v0=half_step"] < error.loc["las", "v0=zero"] / 2
    assert (error["v0=half_step"] != error["v0=zero"]).all()


def check_calibration(done: Finished) -> None:
    """A seed changes a fit to samples and nothing before it, windows change what is captured."""
    rows = sweep_results(done.runs).values()
    assert len(rows) == 8  # 2 lengths of text x 2 codings x 2 seeds

    def keys(stage: str, coding: str) -> list[str]:
        return [row["keys"][stage] for row in rows if row["coding"] == coding]

    for stage in ("capture", "distribution"):
        assert len(set(keys(stage, "multigrain") + keys(stage, "gated"))) == 2
    assert len(set(keys("fitting", "multigrain"))) == 4
    assert len(set(keys("fitting", "gated"))) == 2


def check_roles(found: pd.DataFrame, frame: pd.DataFrame) -> None:
    """Two layers of each role and one head: their weighted geometric mean is the row's nmse."""
    coded = frame[frame["nmse"].notna()]
    errors = found.filter(like="nmse_").dropna(axis=1, how="all")
    weight = np.array([1 if name == "nmse_head.in" else 2 for name in errors.columns])
    weight = weight * errors.notna().to_numpy()
    logs = (np.log(errors.fillna(1.0)) * weight).sum(axis=1) / weight.sum(axis=1)
    assert np.exp(logs).to_numpy() == pytest.approx(coded["nmse"].to_numpy(), rel=1e-6)


def check_quantiles(frame: pd.DataFrame, found: pd.DataFrame) -> None:
    """The errors of every alpha by quantile are those of its row, and uniform levels err in the bulk."""
    assert list(found["ppl_wikipedia"]) == list(frame["ppl_wikipedia"])
    shares = found.filter(like="share_")
    assert shares.sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-6)
    assert found["alpha"].tolist() == [0.0, 0.167]
    assert found["relative_0_0.5"].iloc[0] > found["relative_0_0.5"].iloc[1]


def check_convergence(frame: pd.DataFrame) -> None:
    """Slopes 5, 10 and 80 of one coding, every role of the model."""
    assert sorted(frame["slope"].unique()) == [5, 10, 80]
    assert (frame.groupby("role")["slope"].count() == 3).all() and frame["role"].nunique() == 11
    assert (frame["settled"] <= frame["fell"]).all() and (frame["fell"] <= frame["sites"]).all()
    assert frame["rho"].dropna().between(0, 1).all() and (frame["C"] >= 0).all()
    assert (frame["rho"].isna() == (frame["fell"] == 0)).all()
