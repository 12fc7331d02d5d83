"""What a number is worth: replicates, the dense model's own numbers, and the columns made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.commands import plan
from pipeline.run import runner
from pipeline.run.chain import chain
from pipeline.run.measured import BOOTSTRAP
from pipeline.run.settings import Settings
from pipeline.store.store import Store
from stages import evaluation
from stages.evaluation import Perplexity
from stages.model.perturbation import Perturbation

Make = Callable[..., Settings]
# So many levels that the noise, in a model so small, reaches one of their ends.
CODED = (
    *("coding=las_rounded", "timesteps=14"),
    *("evaluation.tasks=[piqa]", "evaluation.items=40"),
)
THREE = (*CODED, "evaluation.replicates=3")


@pytest.fixture(scope="module")
def once(settings: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds a run of one replicate."""
    store = tmp_path_factory.mktemp("once")
    runner.execute(settings(store, *CODED))
    return store


@pytest.fixture(scope="module")
def thrice(settings: Make, once: Path) -> tuple[dict[str, Any], runner.Run]:
    """The same with two more."""
    result, _, run = runner.execute(settings(once, *THREE))
    return result, run


def windows(run: runner.Run, part: str) -> np.ndarray:
    """The nats a token of every window, as the files have them."""
    frame = pd.read_parquet(run.artifacts[f"evaluation {part}"].path / "windows.parquet")
    return (frame["nll"] / frame["tokens"]).to_numpy()


def test_more_replicates_are_built_beside_those_that_are_there(once, thrice, settings):
    result, run = thrice
    new = {label for label, hit in result["hits"].items() if not hit}
    parts = ("ppl_wikipedia", "acc_piqa", "dense ppl_wikipedia", "dense acc_piqa")
    assert new == {f"evaluation {part} {r}" for part in parts for r in (1, 2)}
    first = runner.execute(settings(once, *CODED))[0]
    assert all(first["hits"].values())
    assert first["keys"] == {n: k for n, k in result["keys"].items() if n not in new}
    for number in ("energy_J", "spikes_per_value", "macs_G", "nmse", "evaluation"):
        assert first[number] == result[number]


def test_each_replicate_says_what_its_perturbation_was(thrice):
    _, run = thrice
    for part in ("ppl_wikipedia", "acc_piqa", "dense ppl_wikipedia"):
        read = []
        for label in (part, f"{part} 1", f"{part} 2"):
            artifact = run.artifacts[f"evaluation {label}"]
            metrics = json.loads((artifact.path / "metrics.json").read_text())
            given = artifact.manifest["spec"]["perturbation"]
            said = metrics.get("perturbation")
            assert said is None or said == {n: given[n] for n in ("seed", "size")}
            assert (said is None) == (given is None)
            read.append(said)
        assert read == [None, {"seed": 1, "size": 2e-7}, {"seed": 2, "size": 2e-7}]


def test_spikes_are_counted_in_the_first_alone(thrice):
    _, run = thrice
    for part in ("ppl_wikipedia", "dense ppl_wikipedia"):
        labels = (f"evaluation {part}{number}" for number in ("", " 1", " 2"))
        counters = [Perplexity.load(run.artifacts[label].path).counters for label in labels]
        assert [len(frame) > 0 for frame in counters] == [True, False, False]


def test_the_columns_of_a_text_follow_from_its_windows(thrice):
    result, run = thrice
    labels = ("ppl_wikipedia", "ppl_wikipedia 1", "ppl_wikipedia 2")
    ours = np.stack([windows(run, label) for label in labels])
    theirs = np.stack([windows(run, f"dense {label}") for label in labels])
    assert ours.shape == (3, 3) and result["replicates"] == 3
    geometric = math.prod(math.exp(row.mean()) for row in ours) ** (1 / 3)
    assert result["ppl_wikipedia"] == pytest.approx(geometric)
    means = [sum(column) / 3 for column in ours.T]
    middle = sum(means) / 3
    variance = sum((mean - middle) ** 2 for mean in means) / 2
    error = geometric * math.sqrt(variance / 3)
    assert result["ppl_wikipedia_se"] == pytest.approx(error)
    each = [math.exp(row.mean()) for row in ours]
    spread = math.sqrt(sum((ppl - sum(each) / 3) ** 2 for ppl in each) / 2)
    assert result["ppl_wikipedia_spread"] == pytest.approx(spread) and spread > 0
    dense = math.exp(theirs.mean())
    assert result["ratio_wikipedia"] == pytest.approx(geometric / dense)
    # Three windows: every resample can be listed, and each of the 27 is as likely.
    differences = ours.mean(0) - theirs.mean(0)
    places = np.stack(np.meshgrid(*[range(3)] * 3)).reshape(3, -1)
    resampled = np.exp(differences[places].mean(0))
    assert result["ratio_wikipedia_low"] == pytest.approx(np.quantile(resampled, 0.025), rel=1e-3)
    assert result["ratio_wikipedia_high"] == pytest.approx(np.quantile(resampled, 0.975), rel=1e-3)
    assert result["ratio_wikipedia_low"] < result["ratio_wikipedia"]
    assert result["bootstrap"] == {
        "resamples": BOOTSTRAP.resamples,
        "seed": BOOTSTRAP.seed,
        "method": "percentile",
        "confidence": 0.95,
    }


def test_the_columns_of_a_task_follow_from_its_questions(thrice):
    result, run = thrice
    labels = ("acc_piqa", "acc_piqa 1", "acc_piqa 2")

    def read(part: str) -> pd.DataFrame:
        return pd.read_parquet(run.artifacts[f"evaluation {part}"].path / "questions.parquet")

    ours = [read(label) for label in labels]
    theirs = [read(f"dense {label}") for label in labels]
    assert [len(each) for each in ours] == [40, 40, 40] == [result["acc_piqa_n"]] * 3
    right = sum(each["correct"].sum() for each in ours)
    assert result["acc_piqa"] == pytest.approx(right / 120)
    assert result["ratio_piqa"] == pytest.approx(
        right / sum(each["correct"].sum() for each in theirs)
    )
    pairs = zip(ours, theirs, strict=True)
    changed = sum((a["chosen"] != b["chosen"]).sum() for a, b in pairs)
    assert result["changed_piqa"] == pytest.approx(changed / 120)
    assert result["ratio_piqa_low"] <= result["ratio_piqa"] <= result["ratio_piqa_high"]


def test_a_coarse_code_changes_answers(once, settings):
    result, _, run = runner.execute(settings(once, *CODED, "timesteps=2"))
    both = [run.artifacts[f"evaluation {part}acc_piqa"].path for part in ("", "dense ")]
    ours, theirs = (pd.read_parquet(path / "questions.parquet")["chosen"] for path in both)
    assert result["changed_piqa"] == (ours != theirs).mean() > 0


def test_one_replicate_has_no_spread_and_one_window_no_error(once, settings):
    result = runner.execute(settings(once, *CODED))[0]
    assert result["ppl_wikipedia_spread"] is result["acc_piqa_spread"] is None
    assert result["ppl_wikipedia"] == result["evaluation"]["wikipedia"]["perplexity"]
    assert result["ppl_wikipedia_se"] > 0 and result["ratio_wikipedia_low"] is not None
    few = ("evaluation.windows=1", "evaluation.items=1")
    result = runner.execute(settings(once, *CODED, *few))[0]
    for name in ("ppl_wikipedia_se", "acc_piqa_se", "ratio_wikipedia_low", "ratio_piqa_high"):
        assert result[name] is None
    assert result["ratio_wikipedia"] > 0


def test_the_dense_row_is_the_reference_and_has_none(once, thrice, settings):
    result, run = thrice
    dense, _, alone = runner.execute(settings(once, *THREE[2:], "coding=dense"))
    assert dense["replicates"] == 3
    for label, key in dense["keys"].items():
        if label != "energy":
            assert result["keys"][label.replace("evaluation ", "evaluation dense ")] == key
            assert dense["hits"][label]
    for name in ("ratio_wikipedia", "ratio_wikipedia_low", "ratio_piqa", "changed_piqa"):
        assert dense[name] is None
    ratio = result["ppl_wikipedia"] / dense["ppl_wikipedia"]
    assert result["ratio_wikipedia"] == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize("transform", ["rotate", "rotate_prefix"])
def test_the_reference_has_the_transform_of_the_row(transform, settings, once):
    behind = (*CODED, f"transform={transform}", "evaluation.replicates=2")
    result = runner.execute(settings(once, *behind))[0]
    dense = runner.execute(settings(once, *behind, "coding=dense"))[0]
    labels = [label for label in dense["keys"] if label.startswith("evaluation")]
    for label in labels:
        assert dense["hits"][label]
    assert result["ratio_wikipedia"] == pytest.approx(
        result["ppl_wikipedia"] / dense["ppl_wikipedia"], rel=1e-12
    )
    assert result["ppl_wikipedia_spread"] > 0 and dense["ppl_wikipedia_spread"] > 0


def test_without_noise_replicates_do_not_spread(settings, tmp_path, monkeypatch):
    made = settings(tmp_path, *THREE)
    silent = property(lambda self: (None, Perturbation(1, 0.0), Perturbation(2, 0.0)))
    monkeypatch.setattr(evaluation.Evaluation, "perturbations", silent)
    result = runner.execute(made)[0]
    assert result["ppl_wikipedia_spread"] == result["acc_piqa_spread"] == 0
    assert result["replicates"] == 3


def test_a_model_in_files_has_the_replicates_of_one_in_memory(settings, tmp_path):
    few = (*CODED[:2], "evaluation.replicates=2")
    there, lazy = (
        runner.execute(settings(tmp_path / name, *few, f"runtime={name}"))[0]
        for name in ("default", "offload")
    )
    assert there["keys"] == lazy["keys"]
    for name in ("ppl_wikipedia", "ppl_wikipedia_spread", "ratio_wikipedia"):
        assert lazy[name] == there[name] and there["ppl_wikipedia_spread"] > 0


def test_a_plan_names_replicates_and_the_dense_model(once, thrice, settings):
    store = Store(once)
    chosen = [settings(once, *CODED, f"evaluation.replicates={r}") for r in (3, 4)]
    first, second = plan.plan(chain(made, store) for made in chosen)
    assert not first.builds
    parts = ("ppl_wikipedia", "acc_piqa", "dense ppl_wikipedia", "dense acc_piqa")
    assert set(second.builds) == {f"evaluation {part} 3" for part in parts}
    missing = runner.stored(chosen[1])[1]
    assert set(missing) == set(second.builds)


def test_an_exported_card_has_the_errors(settings, tmp_path):
    made = settings(tmp_path, *THREE, "evaluation.replicates=2", "export.enabled=true")
    result, _, run = runner.execute(made)
    card = (run.artifacts["export"].path / "README.md").read_text()
    for name in ("ppl_wikipedia", "ppl_wikipedia_se", "ppl_wikipedia_spread", "ratio_wikipedia"):
        assert f"| {name} | {result[name]:.5g} |" in card
