"""The runner: what is stored is never computed again, and what is asked for is computed once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.run import evaluations, models, runner, stages, texts
from pipeline.run.settings import Settings
from stages.errors import InputError
from stages.transforms.rotation import online_rotation

Make = Callable[..., Settings]
DENSE = "evaluation dense ppl_wikipedia"
FOUR = ("capture", "distribution", "fitting", "patching")  # of a coding without statistics


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("nothing may be loaded")


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The sources of the models that are loaded from now on."""
    found: list[str] = []
    load = models.load

    def counted(source: str, **options: Any) -> Any:
        found.append(source)
        return load(source, **options)

    monkeypatch.setattr(models, "load", counted)
    models._loaded.cache_clear()
    return found


@pytest.fixture(scope="module")
def built(settings: Make, tmp_path_factory) -> Path:
    """A store that holds a whole run."""
    store = tmp_path_factory.mktemp("built")
    runner.execute(settings(store))
    return store


@pytest.mark.parametrize("coding", ["gated", "multigrain", "lloyd_max", "dense"])
def test_a_run_loads_its_model_once_and_none_the_second_time(coding, settings, tmp_path, loads):
    chosen = settings(tmp_path, f"coding={coding}")
    first, *_ = runner.execute(chosen)
    assert loads == [chosen.model.path] and not any(first["hits"].values())
    models._loaded.cache_clear()
    second, *_ = runner.execute(chosen)
    assert len(loads) == 1 and all(second["hits"].values())
    assert second | {"hits": first["hits"]} == first


def test_a_run_whose_results_are_stored_computes_nothing(settings, built, monkeypatch):
    chosen = settings(built)
    for module, name in (
        (models, "load"),
        (texts, "read_pieces"),
        (texts, "token_ids"),
        (type(chosen.capture), "run"),
        (type(chosen.distribution), "run"),
        (type(chosen.fitting), "run"),
        (type(chosen.patching), "run"),
        (evaluations.evaluation, "perplexity"),
        (evaluations, "of_model"),
    ):
        monkeypatch.setattr(module, name, forbidden)
    models._loaded.cache_clear()
    result, sites, _ = runner.execute(chosen)
    assert all(result["hits"].values()) and len(sites) == 21


def test_codings_share_what_comes_before_fitting(settings, built, loads):
    result, *_ = runner.execute(settings(built, "coding=las"))
    assert result["hits"]["capture"] and result["hits"]["distribution"]
    assert not result["hits"]["fitting"]
    assert len(loads) == 1


def test_what_a_coding_does_not_use_is_not_in_its_key(settings, built):
    plain = runner.execute(settings(built))[0]["keys"]
    other = ("fitting.seed=7", "fitting.samples=9", "tasks.piqa.metric=acc")
    assert runner.execute(settings(built, *other))[0]["keys"] == plain
    assert runner.execute(settings(built, "row=other"))[0]["keys"] == plain


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("calibration.windows=3", set()),
        ("capture.mantissa_bits=6", set()),
        ("sites=paper", set()),
        ("distribution.atoms=65", {"capture"}),
        ("coding.grains=3", {"capture", "distribution"}),
        ("patching.windows=1", {"capture", "distribution", "fitting", "evaluation", "energy"}),
        ("evaluation.windows=2", {"capture", "distribution", "fitting", "patching"}),
        (
            "energy.profile.nm45.ac=0.5",
            {"capture", "distribution", "fitting", "patching", "evaluation"},
        ),
    ],
)
def test_a_field_changes_its_stage_and_what_is_made_of_it(change, kept, settings, built):
    before = runner.execute(settings(built))[0]["keys"]
    after = runner.execute(settings(built, change))[0]["keys"]
    same = {label for label, key in after.items() if key == before[label]}
    assert (DENSE in same) == (change != "evaluation.windows=2")
    assert {label.split()[0] for label in same - {DENSE}} == kept


def test_another_release_of_lm_eval_asks_other_questions(settings, built, monkeypatch):
    made = settings(built, "evaluation.tasks=[piqa]")
    before = runner.stored(made)[0].chain
    monkeypatch.setattr(
        "pipeline.run.evaluations.version", lambda package: f"{package} of tomorrow"
    )
    after = runner.stored(made)[0].chain
    changed = {
        label for label in before.steps if before.steps[label].key() != after.steps[label].key()
    }
    assert changed == {"evaluation acc_piqa", "evaluation dense acc_piqa"}


def test_another_file_under_the_same_name_is_another_text(settings, built, tmp_path):
    file = tmp_path / "evaluation.jsonl"
    own = settings(built, f"corpus.wikipedia.path={file}")
    source = Path(settings(built).corpus["wikipedia"].path)
    file.write_bytes(source.read_bytes())
    plain = runner.execute(settings(built))[0]
    assert runner.execute(own)[0]["keys"] == plain["keys"]  # by content, not by name
    file.write_text(source.read_text().replace("a", "z"))
    changed = runner.execute(own)[0]
    assert not changed["hits"]["evaluation ppl_wikipedia"] and changed["hits"]["patching"]
    assert changed["ppl_wikipedia"] != plain["ppl_wikipedia"]


def test_every_window_begins_with_the_token_of_the_model(settings, built, monkeypatch):
    seen: dict[str, Tensor] = {}

    def noted(run: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def spy(*args: Any, **options: Any) -> Any:
            seen[stage] = next(each for each in args if isinstance(each, Tensor))
            return run(*args, **options)

        return spy

    chosen = settings(built, "model.begin=256", "coding=multigrain", "coding.tau=running_maximum")
    for place, name in (
        (type(chosen.capture), "run"),
        (type(chosen.patching), "run"),
        (evaluations.evaluation, "perplexity"),
    ):
        monkeypatch.setattr(place, name, noted(getattr(place, name), f"{place.__name__}"))
    measuring = stages.measuring
    monkeypatch.setattr(stages, "measuring", lambda *of: noted(measuring(*of), "statistic"))
    runner.execute(chosen)
    assert len(seen) == 4
    assert all(bool((ids[:, 0] == 256).all()) and ids.shape[1] == 48 for ids in seen.values())
    assert not any(bool((ids[:, 1:] == 256).any()) for ids in seen.values())


def test_the_perplexity_behind_a_begin_token_is_that_of_the_text_alone(settings, built, tiny_run):
    result, _, run = runner.execute(settings(built, "model.begin=256", "coding=dense"))
    step = run.chain.sources["tokens wikipedia evaluation"]
    text = load_file(built / "tokens" / step.key() / "tokens.safetensors")["ids"].long()
    model, _ = run.model.load()
    losses = []
    for window in range(3):
        own = text[window * 47 : (window + 1) * 47]
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor([256]), own])[None]).logits[0]
        chance = logits.double().softmax(-1)[
            torch.arange(47), own
        ]  # of each token by the one before
        losses += [-chance.log()]
    assert result["ppl_wikipedia"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)
    assert (
        result["ppl_wikipedia"]
        != runner.execute(settings(built, "coding=dense"))[0]["ppl_wikipedia"]
    )


def test_a_begin_token_is_in_the_keys_of_what_is_measured_on_windows(settings, built):
    def keys(*overrides: str) -> dict[str, str]:
        made = settings(built, "coding=dense", "evaluation.tasks=[piqa]", *overrides)
        found = runner.stored(made)[0].chain
        return {label: step.key() for label, step in (found.sources | found.steps).items()}

    plain, begun, other = keys(), keys("model.begin=256"), keys("model.begin=255")
    assert plain == keys("model.begin=null")
    changed = {label for label in plain if len({plain[label], begun[label], other[label]}) == 3}
    same = {label for label in plain if plain[label] == begun[label] == other[label]}
    assert changed == {"evaluation ppl_wikipedia", "energy"} and changed | same == set(plain)


@pytest.mark.parametrize("begin", [-1, 258])
def test_a_begin_token_that_the_model_lacks_is_refused(begin, settings, tmp_path):
    with pytest.raises(InputError, match=f"model.begin={begin}: tiny has the tokens 0 to 257"):
        runner.execute(settings(tmp_path, f"model.begin={begin}"))


def test_changed_weights_in_the_same_folder_are_another_model(settings, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.model, tmp_path / "model")
    chosen = settings(tmp_path / "store", f"model.path={folder}", "coding=dense")
    before = runner.execute(chosen)[0]
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    after = runner.execute(chosen)[0]
    assert not any(after["hits"].values())
    assert after["ppl_wikipedia"] != before["ppl_wikipedia"]


def test_the_numbers_of_a_row_are_those_of_its_artifacts(settings, built):
    result, sites, run = runner.execute(settings(built))
    coded = sites.dropna(subset=["acs"])
    assert result["spikes_per_value"] == pytest.approx(coded["acs"].sum() / coded["macs"].sum())
    product = 1.0
    for nmse in sites["nmse"]:
        product *= nmse ** (1 / len(sites))
    assert result["nmse"] == pytest.approx(product)
    above = sum(db * macs for db, macs in zip(sites["bound_db"], sites["macs"], strict=True))
    assert result["bound_db"] == pytest.approx(above / sites["macs"].sum())
    assert result["saving"] == pytest.approx(
        1 - result["energy_J"] / runner.execute(settings(built, "coding=dense"))[0]["energy_J"]
    )
    built_in = [run.artifacts[stage].manifest["seconds"] for stage in FOUR]
    assert result["conversion_s"] == pytest.approx(sum(built_in), abs=1e-3)
    assert result["fitting_s"] == pytest.approx(built_in[FOUR.index("fitting")], abs=1e-3)
    measured, *_ = runner.execute(settings(built, "coding=gated_budget", "timesteps=4"))
    of_two = measured["seconds"]["statistics sensitivity"] + measured["seconds"]["fitting"]
    assert measured["fitting_s"] == pytest.approx(of_two, abs=1e-3)


def test_a_failed_stage_keeps_what_was_built_before_it(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(evaluations.evaluation, "perplexity", forbidden)
        runner.execute(settings(tmp_path))
    result, *_ = runner.execute(settings(tmp_path))
    assert {stage for stage, hit in result["hits"].items() if hit} == set(FOUR)


@pytest.mark.parametrize("transform", ["rotate", "rotate_prefix"])
def test_a_transform_is_another_model_of_the_same_text(transform, settings, built, loads):
    plain = runner.execute(settings(built))[0]
    tokenised = set((built / "tokens").iterdir())
    result = runner.execute(settings(built, f"transform={transform}"))[0]
    assert result["transform"] == result["axes"]["transform"] == transform
    assert plain["transform"] == "none"
    stages = set(result["keys"])
    assert stages - set(plain["keys"]) == ({"prefix"} if transform == "rotate_prefix" else set())
    assert not {stage for stage in plain["keys"] if plain["keys"][stage] == result["keys"][stage]}
    assert set((built / "tokens").iterdir()) == tokenised  # the texts are shared
    again = runner.execute(settings(built, f"transform={transform}"))[0]
    assert all(again["hits"].values()) and again["keys"] == result["keys"]
    assert runner.execute(settings(built))[0]["keys"] == plain["keys"]


def test_dense_under_a_transform_is_the_dense_model_with_its_costs(settings, built, tiny_run):
    plain, rotated, behind = (
        runner.execute(settings(built, "coding=dense", f"transform={name}"))
        for name in ("none", "rotate", "rotate_prefix")
    )
    perplexity = [result["ppl_wikipedia"] for result, *_ in (plain, rotated, behind)]
    assert perplexity[1] == pytest.approx(perplexity[0], rel=1e-5)
    assert perplexity[2] != pytest.approx(perplexity[0], rel=1e-5)
    additions = [result["acs_G"] for result, *_ in (plain, rotated, behind)]
    tokens = 48 * 2 * 48  # inner width, layers, tokens; 48 = 16 x 3
    assert (additions[1] - additions[0]) * 1e9 == pytest.approx(4 * tokens)
    products = [result["macs_G"] for result, *_ in (plain, rotated, behind)]
    assert (products[1] - products[0]) * 1e9 == pytest.approx(3 * tokens)
    found = json.loads((behind[2].artifacts["prefix"].path / models.PREFIX).read_text())
    assert found["ids"] == [256]  # the model's weights are random: it has no outliers
    per_pair = 2 * 4 * (2 * 8 + 3)  # both products of 4 heads in 2 layers, and their softmax
    assert (products[2] - products[1]) * 1e9 == pytest.approx(per_pair * 48)
    assert "prefix" not in rotated[2].artifacts


def test_every_transform_has_its_own_model_in_memory(settings, tmp_path, loads):
    plain, _ = runner.start(settings(tmp_path)).model.load()
    run = runner.start(settings(tmp_path, "transform=rotate"))
    rotated, _ = run.model.load()
    assert rotated is run.model.load()[0] and rotated is not plain
    assert online_rotation(rotated) is not None and online_rotation(plain) is None
    assert len(loads) == 2


def test_the_scales_of_norms_are_fused_where_that_is_asked(settings, tmp_path, monkeypatch):
    fused: list[object] = []
    monkeypatch.setattr("stages.transforms.transform.fuse", fused.append)
    plain, asked = (runner.start(settings(tmp_path, *t)).model for t in ((), ("transform=fuse",)))
    assert asked.key() != plain.key()
    plain.load()
    assert fused == []
    model, _ = asked.load()
    assert fused == [model]
    models.forget()


def test_the_seed_of_a_rotation_and_the_search_of_a_prefix_make_other_artifacts(settings, built):
    def keys(*overrides: str) -> dict[str, str]:
        return runner.execute(settings(built, "coding=dense", *overrides))[0]["keys"]

    ppl = "evaluation ppl_wikipedia"
    first = keys("transform=rotate")
    assert keys("transform=rotate", "transform.seed=1")[ppl] != first[ppl]
    found = keys("transform=rotate_prefix")
    assert keys("transform=rotate_prefix", "transform.seed=1")["prefix"] == found["prefix"]
    other = keys("transform=rotate_prefix", "transform.search.outlier=65")
    assert other["prefix"] != found["prefix"] and other[ppl] != found[ppl]
