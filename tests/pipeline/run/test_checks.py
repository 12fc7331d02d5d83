"""What a later stage would refuse is refused before the first one, by a run and by its plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from pipeline.commands import plan
from pipeline.run import checks, runner
from pipeline.run.chain import chain
from pipeline.run.settings import Settings
from pipeline.store.store import Store
from stages.errors import InputError
from tests.pipeline.conftest import Tiny

Make = Callable[..., Settings]
QUESTION = {"goal": "to go", "sol1": "walk", "sol2": "run", "label": 1}


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tiny_run: Tiny) -> Path:
    """Unusable texts and questions."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "empty.jsonl").write_text('{"text": ""}\n')
    (folder / "body.jsonl").write_text('{"body": "x"}\n')
    pair = {"sentence": "A _ is red.", "option1": "bag", "option2": "box", "answer": "2"}
    (folder / "winogrande.jsonl").write_text(json.dumps(pair) + "\n")
    (folder / "late.jsonl").write_text('{"text": "x"}\n{"body": "x"}\n')
    for model_type, more in {"mamba": {}, "mistral": {"sliding_window": 48}}.items():
        AutoConfig.for_model(model_type, **more).save_pretrained(folder / model_type)
    for name, change in {
        "columns": {"sol2": None},
        "label": {"label": -1},
        "high": {"label": 2},
    }.items():
        rows = [QUESTION, QUESTION | change]
        if name == "columns":
            rows = [{k: v for k, v in QUESTION.items() if k != "sol2"}]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


WINOGRANDE = ("tasks.winogrande.path={texts}/winogrande.jsonl", "evaluation.tasks=[winogrande]")
SMALL = "transform.search.outlier=1.2"  # random weights have tokens that are outliers by so much
PREFIX = ("transform=rotate_prefix", "calibration.length=32")
LATER = {  # what only the tokens tell
    "evaluation": (["evaluation.windows=500"], "evaluation text wikipedia has .* need 24000"),
    "calibration": (["calibration.windows=500"], "calibration text wikipedia has .* need 24000"),
    "held out": (["patching.windows=500"], "500 windows of 48 tokens after 192 need 24192"),
    "a late row": (["corpus.wikipedia.path={texts}/late.jsonl"], "line 2 has no text in field"),
}
AT_ONCE = {
    "empty": (["corpus.wikipedia.path={texts}/empty.jsonl"], "empty.jsonl is empty|has 0 tokens"),
    "field": (["corpus.wikipedia.path={texts}/body.jsonl"], "line 1 .* it has the fields body"),
    "calibrating": (["corpus.wikipedia.calibration_path={texts}/body.jsonl"], "fields body"),
    "columns": (
        ["tasks.piqa.path={texts}/columns.jsonl"],
        "questions of piqa .*first row has goal, sol1, label;",
    ),
    "label": (["tasks.piqa.path={texts}/label.jsonl"], "question 2 has -1 as its right answer"),
    "high": (["tasks.piqa.path={texts}/high.jsonl"], "question 2 has 2 as its right answer"),
    "no such task": (["tasks.piqa.task=piqqa"], "no task 'piqqa'; did you mean"),
    "a group": (["tasks.piqa.task=mmlu"], "mmlu is a group of tasks"),
    "other columns": (["tasks.piqa.task=winogrande"], "first row has goal, sol1, sol2, label;"),
    "metric": (["tasks.winogrande.metric=acc_norm", *WINOGRANDE], "winogrande is scored by acc$"),
    "stepped": (["coding=lloyd_max", "runtime.execution=stepped"], "no steps in"),
    "integers": (["coding=integer", "runtime.execution=stepped"], "integers have no spikes"),
    "bits": (["coding=integer", "timesteps=8", "evaluation.anytime=true"], "no steps in"),
    "anytime": (["coding=compander", "evaluation.anytime=true"], "no steps in"),
    "family": (["model.path={texts}/mamba"], "is a state-space layer"),
    "no such site": (
        ["sites.exclude=[lm_head:inn]"],
        "no site lm_head:inn; did you mean lm_head:in",
    ),
    "window": (
        ["model.path={texts}/mistral", *PREFIX, "evaluation.length=48"],
        "evaluation.length=48 behind a prefix of 1: the model's window of 48 .* at most 47 tokens",
    ),
    "sensitivity": (["coding=gated_budget", "calibration.windows=1"], "calibration.windows=1"),
}


def chosen(settings: Make, store: Path, texts: Path, overrides: list[str]) -> Settings:
    tasks = ["evaluation.tasks=[piqa]"] if "tasks." in overrides[0] else []
    return settings(store, *tasks, *(each.format(texts=texts) for each in overrides))


@pytest.mark.parametrize("case", [*LATER, *AT_ONCE])
def test_a_run_is_refused_before_its_first_stage(case, settings, texts, tmp_path):
    overrides, message = (LATER | AT_ONCE)[case]
    with pytest.raises(InputError, match=message) as error:
        runner.execute(chosen(settings, tmp_path, texts, overrides))
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.glob("[!.]*")} <= {"tokens"}


@pytest.mark.parametrize("case", AT_ONCE)
def test_a_plan_refuses_it_and_builds_nothing(case, settings, texts, tmp_path):
    overrides, message = AT_ONCE[case]
    made = chosen(settings, tmp_path, texts, overrides)
    with pytest.raises(InputError, match=message):
        checks.planned(chain(made, Store(tmp_path)))
    assert not list(tmp_path.glob("[!.]*"))


def test_what_a_prefix_leaves_no_room_for_is_refused_before_the_capture(
    settings, texts, tmp_path, tiny_run: Tiny
):
    """How many tokens it has is known once it is found."""
    folder = tmp_path / "windowed"
    shutil.copytree(tiny_run.model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 49}))
    ours = settings(tmp_path / "store", f"model.path={folder}", *PREFIX, SMALL)
    prefix = r"evaluation.length=48 behind a prefix of [2-9]\d*: rope_type 'dynamic' turns"
    with pytest.raises(InputError, match=prefix):
        runner.execute(ours)
    stages = {path.name for path in (tmp_path / "store").iterdir() if path.is_dir()}
    assert "prefix" in stages and "capture" not in stages


def test_a_plan_of_what_can_run_is_silent(settings, tmp_path):
    made = settings(tmp_path, "evaluation.tasks=[piqa]", "evaluation.windows=500")
    checks.planned(chain(made, Store(tmp_path)))  # how many tokens there are, it cannot know
    assert plan.plan([chain(made, Store(tmp_path))])[0].stored == 0


def test_questions_are_read_only_where_their_accuracy_is_not_stored(
    settings, tmp_path, monkeypatch
):
    from stages.text import harness

    made, asked = settings(tmp_path, "coding=dense", "evaluation.tasks=[piqa]"), []
    check = harness.check
    monkeypatch.setattr(
        harness, "check", lambda spec, *rest: asked.append(spec.name) or check(spec, *rest)
    )
    first, *_ = runner.execute(made)
    assert asked == ["piqa"]
    assert runner.execute(made)[0]["acc_piqa"] == first["acc_piqa"] and asked == ["piqa"]


def test_a_job_whose_artifacts_are_all_there_reads_no_config_of_its_model(
    settings, tmp_path, monkeypatch
):
    made = settings(tmp_path, "coding=las", "timesteps=4")
    read: list[str] = []
    for name in ("positions", "sites"):
        check = getattr(checks, name)
        monkeypatch.setattr(
            checks, name, lambda *a, name=name, check=check: read.append(name) or check(*a)
        )
    first, *_ = runner.execute(made)
    assert read == ["positions", "sites"]
    checks.planned(chain(made, Store(tmp_path)))
    assert runner.execute(made)[0]["keys"] == first["keys"] and len(read) == 2
    # a number of positions is in no key
    ours = settings(tmp_path, "coding=las", "timesteps=4", "model.positions=40")
    with pytest.raises(InputError, match=r"tiny has 40 positions"):
        checks.planned(chain(ours, Store(tmp_path)))
    with pytest.raises(InputError, match=r"tiny has 40 positions"):
        runner.execute(ours)
    # of what is not there it is read
    other = settings(tmp_path, "coding=las", "timesteps=5")
    checks.planned(chain(other, Store(tmp_path)))
    assert read[4:] == ["positions", "sites"]
