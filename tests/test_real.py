"""The real 135M model: what the README's table shows, on a small budget."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import stages
from pipeline.run import models, runner
from pipeline.run.settings import Settings
from pipeline.run.texts import load_tokens
from pipeline.store.store import Store
from stages.checkpoint.folder import save
from stages.codings.base import Coding
from stages.codings.dense import Dense
from stages.compiler import use_compiler
from stages.distribution import Densities
from stages.evaluation import perplexity
from stages.fitted import Conversion, FittedNeurons
from stages.fitting import Fitting
from stages.ports.patched import patched
from stages.text import corpus
from stages.text.documents import read_pieces
from stages.text.tokenising import Pieces, token_ids
from stages.transforms.transform import Untouched
from tests.transforms.held import Kept, compare

pytestmark = pytest.mark.real
Fitted = Callable[..., Conversion]
ROOT = Path(__file__).parents[1]
SMALL = ["experiment=none", "calibration.windows=4", "patching.windows=1", "tracking.enabled=false"]


def configured(*overrides: str) -> Settings:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        # The store of the checkout, so that the model is downloaded and dequantised once.
        store = f"store.path={ROOT / 'outputs/store'}"
        return instantiate(compose("config", [*SMALL, store, *overrides]))


@pytest.fixture(scope="module")
def run() -> runner.Run:
    return runner.start(configured("coding=gated", "runtime.compile=true"))


@pytest.fixture(scope="module")
def densities(run: runner.Run) -> Densities:
    use_compiler(True)
    runner.convert(run)
    return Densities.load(run.artifacts["distribution"].path)


@pytest.fixture(scope="module")
def fitted(densities: Densities) -> Fitted:
    """Fits the coding that the overrides choose, each once."""

    @functools.cache
    def fit(spec: Fitting, coding: Coding) -> Conversion:
        return Conversion(coding, spec.run(densities, coding))

    def chosen(*overrides: str) -> Conversion:
        settings = configured(*overrides)
        assert not isinstance(settings.coding, Dense)
        return fit(settings.fitting.for_coding(settings.coding), settings.coding)

    return chosen


NAMES = ("wikitext2/raw/wiki.test.raw", "wikitext2/test.jsonl", "c4/validation.jsonl.gz")
PLACES = [parent / "shared/data" / name for parent in ROOT.parents for name in NAMES]
TEXTS = [place for place in PLACES if place.is_file()]


@pytest.mark.skipif(not TEXTS, reason="evaluation data not present")
def test_ids_in_pieces_are_those_of_the_whole_text(run: runner.Run) -> None:
    """On the texts, and on one with runs of blanks, of a letter and of digits at the cuts."""
    tokenizer = run.model.tokenizer()
    documents = [
        text
        for path in TEXTS
        for text, _ in islice(read_pieces(path, "text", "lines"), 2000)
        if text
    ]
    long = "".join(letter * (3000 + n) for n, letter in enumerate(" \n7a\t é"))
    for text in ("\n\n".join(documents), long.join(documents[:9])):
        expected = tokenizer(text, verbose=False)["input_ids"]
        for pieces in (Pieces(), Pieces(10_000, 500, 4)):
            found = list(token_ids([text], tokenizer, pieces))
            assert np.concatenate(found).tolist() == expected
            assert len(found) > min(3, len(text) // pieces.size)


def mean_error(neurons: FittedNeurons) -> float:
    return float(neurons.nmse.log().mean().exp())


def test_all_301_sites_are_fitted_and_gating_cuts_the_error_fifteenfold(
    fitted: Fitted,
) -> None:
    rounded = fitted("coding=las_rounded", "coding.timesteps=6")
    gated = fitted("coding=gated", "coding.timesteps=6", "coding.grains=2")
    assert len(gated.neurons.sites) == 301
    assert mean_error(gated.neurons) <= mean_error(rounded.neurons) / 15


@pytest.mark.parametrize("timesteps", [6, 8])
def test_no_ungated_code_beats_the_optimal_quantiser(fitted: Fitted, timesteps: int) -> None:
    time = f"coding.timesteps={timesteps}"
    bound = fitted("coding=lloyd_max", time).neurons.nmse
    for coding in (
        ["las"],
        ["las_rounded"],
        ["phase"],
        ["multigrain"],
        ["gated", "coding.grains=1"],
    ):
        found = fitted(f"coding={coding[0]}", time, *coding[1:]).neurons.nmse
        assert bool((bound <= found * (1 + 1e-6)).all()), coding


def test_perplexity_of_gated_neurons_is_near_the_dense_one(run: runner.Run, fitted: Fitted) -> None:
    use_compiler(True)
    found = run.chain.tokens["wikipedia", "evaluation"].build(run.store, run.runtime)
    ids = corpus.windows(load_tokens(found), 2, 512)
    model, _ = run.model.load()

    def measured(conversion: Conversion | None) -> float:
        return float(perplexity(model, ids, conversion, 1, "wikipedia").metrics["perplexity"])

    dense = measured(None)
    assert 5 < dense < 40
    two = fitted("coding=gated", "coding.timesteps=6", "coding.grains=2")
    three = fitted("coding=gated", "coding.timesteps=6", "coding.grains=3")
    eight = fitted("coding=gated", "coding.timesteps=8", "coding.grains=2")
    base2 = fitted("coding=las_rounded", "coding.timesteps=6")
    ratios = {n: measured(c) / dense for n, c in {"2": two, "3": three, "8": eight}.items()}
    assert ratios["2"] <= 1.06 and ratios["3"] <= 1.03 and ratios["8"] <= 1.01, ratios
    assert measured(base2) > 5 * dense  # one range is not enough: the ranges are what does it


@pytest.mark.parametrize(("timesteps", "part"), [(6, 0.90), (8, 0.86)])
def test_signed_digits_spare_spikes_at_the_same_levels(
    run: runner.Run, fitted: Fitted, timesteps: int, part: float
) -> None:
    """Weighted by fan-out, behind the same gate of two ranges."""
    use_compiler(True)
    found = run.chain.tokens["wikipedia", "evaluation"].build(run.store, run.runtime)
    ids = corpus.windows(load_tokens(found), 1, 512)
    model, _ = run.model.load()
    rates, errors = [], []
    for coding in ("gated", "signed_digit"):
        choice = (f"coding={coding}", f"coding.timesteps={timesteps}", "coding.grains=2")
        conversion = fitted(*choice)
        counters = perplexity(model, ids, conversion, 1, "wikipedia").counters
        rates.append(counters["acs"].sum() / counters["macs"].sum())
        errors.append(conversion.neurons.nmse)
    assert rates[1] <= part * rates[0]
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-3, atol=0)


def test_a_rotation_leaves_the_model_what_it_was(run: runner.Run) -> None:
    """Norm scales fused, embedding and head untied, 1536 = 512 * 3 inputs rotated online."""
    found = run.chain.tokens["wikipedia", "evaluation"].build(run.store, run.runtime)
    ids = corpus.windows(load_tokens(found), 1, 512)
    values = []
    for transform in ("none", "rotate"):
        model, _ = runner.start(configured("coding=dense", f"transform={transform}")).model.load()
        with torch.inference_mode():
            values.append(model(ids).logits)
    assert float((values[1] - values[0]).abs().max()) < 1e-3 * float(values[0].abs().max())


def test_the_model_is_plain_safetensors_after_the_first_time(run: runner.Run) -> None:
    """A copy that was dequantised once is plain safetensors: no GGUF code runs any more."""
    assert (Path(run.model.source) / "model.safetensors").is_file()
    assert Store(ROOT / "outputs/store").open("model", Path(run.model.source).name).hit
    model, tokenizer = run.model.load()
    assert model.dtype == torch.float32 and tokenizer("Hello world")["input_ids"]


def test_the_model_from_disk_is_the_one_in_memory(run: runner.Run) -> None:
    """Layer by layer, to the bit: loss and counters of a window of real text."""
    lazy = runner.start(configured("runtime=offload", "evaluation.tasks=[]")).model
    assert lazy.key() == run.model.key()
    step = run.chain.tokens["wikipedia", "evaluation"].build(run.store, run.runtime)
    ids = corpus.windows(load_tokens(step), 1, 256)
    found = [perplexity(model.load()[0], ids, None, 1, "wikipedia") for model in (run.model, lazy)]
    assert found[0].metrics == found[1].metrics
    assert found[0].counters.equals(found[1].counters)
    assert found[0].metrics["perplexity"] < 60
    models.forget()


@pytest.mark.parametrize("coding", ["las", "multigrain", "gated", "signed_digit", "one_spike"])
def test_the_stepped_model_is_the_fast_one(run: runner.Run, fitted: Fitted, coding: str) -> None:
    """What reaches every site, the logits and the spikes: a value in the last bit on the other side of
    a threshold is another code, so that each site goes on from what it has in the fast path."""
    conversion = fitted(f"coding={coding}", "timesteps=6")
    step = run.chain.tokens["wikipedia", "evaluation"].build(run.store, run.runtime)
    ids = corpus.windows(load_tokens(step), 1, 32)
    found = compare(run.model.load()[0], conversion, ids)
    assert len(found.far) == 301
    assert max(found.far.values()) < 1e-5, max(found.far, key=found.far.__getitem__)
    assert found.logits < 1e-5
    assert torch.equal(*found.counters)


def test_an_export_is_the_model_that_was_converted(
    run: runner.Run,
    fitted: Fitted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What reaches every site and the logits, to the bit."""
    conversion = fitted("coding=gated", "coding.timesteps=6", "coding.grains=2")
    step = run.chain.tokens["wikipedia", "evaluation"].build(run.store, run.runtime)
    ids = corpus.windows(load_tokens(step), 1, 32)
    model, _ = run.model.load()
    made: list[Kept] = []

    class Recorded(Kept):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr("stages.ports.patched.SpikingPort", Recorded)
    with torch.inference_mode():
        with patched(model, conversion):
            expected = model(ids, use_cache=False).logits
        save(model, conversion, Untouched(), (), tmp_path)
        found = stages.load(str(tmp_path))(ids, use_cache=False).logits
    ours, theirs = made[:301], made[301:]
    assert len(ours) == len(theirs) == len(conversion.neurons.sites)
    assert all(torch.equal(a.seen, b.seen) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(found, expected)
