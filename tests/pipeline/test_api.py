"""`import stages` for Python users: the neurons of the pipeline, on a model that is in memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import stages
from pipeline.run import runner
from stages.errors import InputError
from stages.registry import registered
from tests.pipeline.conftest import CONF, Tiny

if TYPE_CHECKING:
    from pipeline.run.settings import Settings

Draws = Callable[..., Tensor]


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids).logits


@pytest.fixture
def sdpa(tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A model as `from_pretrained` gives it."""
    return tiny(attention="sdpa")


@pytest.mark.parametrize(
    "coding", ["gated", "multigrain", "gated_budget", "gif"], ids=lambda name: str(name)
)
def test_its_neurons_and_errors_are_those_of_the_pipeline(
    coding: str, settings: Callable[..., Settings], tiny_run: Tiny, tmp_path: Path
) -> None:
    own = settings(tmp_path, f"coding={coding}", "timesteps=4")
    run = runner.start(own)
    expected = runner.convert(run)
    measured = Path(run.artifacts["patching"].path) / "sites.parquet"

    model = AutoModelForCausalLM.from_pretrained(tiny_run.model)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_run.model)
    rows = (tiny_run.folder / "calibration.jsonl").read_text().splitlines()
    ids = tokenizer("\n\n".join(json.loads(row)["text"] for row in rows))["input_ids"]
    windows = torch.tensor(ids[: 6 * 48]).view(6, 48)
    given = {"distribution": own.distribution, "fitting": own.fitting}
    stages.convert(model, windows[:4], own.coding, **given)

    neurons = stages.conversion(model).neurons
    assert neurons.sites == expected.neurons.sites
    assert neurons.fit.params.keys() == expected.neurons.fit.params.keys()
    for name, value in expected.neurons.fit.params.items():
        assert torch.equal(neurons.fit.params[name], value), name
    import pandas as pd

    on_held_out = stages.measure(model, windows[4:])
    pd.testing.assert_frame_equal(on_held_out, pd.read_parquet(measured))


def test_a_converted_model_spikes_until_it_is_restored(
    sdpa: PreTrainedModel, tokens: Draws
) -> None:
    ids = tokens(2, 24)
    weights = {name: value.clone() for name, value in sdpa.state_dict().items()}
    dense = logits(sdpa, ids)
    assert stages.convert(sdpa, tokens(4, 16, seed=1), stages.Gated(timesteps=4)) is sdpa
    spiking = logits(sdpa, ids)
    assert (spiking - dense).abs().max() > 1e-3
    assert sdpa.generate(ids[:1, :8], max_new_tokens=3, do_sample=False).shape == (1, 11)
    assert stages.restore(sdpa) is sdpa
    assert torch.equal(logits(sdpa, ids), dense)
    assert sdpa.config._attn_implementation == "sdpa"
    assert not hasattr(sdpa.config, "quantization_config")
    assert {n for n, v in sdpa.state_dict().items() if torch.equal(v, weights[n])} == set(weights)


def test_a_model_that_is_forgotten_leaves_others_of_its_config_spiking(
    sdpa: PreTrainedModel, tokens: Draws
) -> None:
    def spiking() -> PreTrainedModel:
        model: PreTrainedModel = type(sdpa)(sdpa.config).eval()
        return stages.convert(model, tokens(2, 16), stages.Gated("gated", 4, 2))

    forgotten, model = spiking(), spiking()
    before = model(tokens(1, 8)).logits
    del forgotten
    gc.collect()
    assert torch.equal(model(tokens(1, 8)).logits, before)
    stages.restore(model)


def test_a_block_of_spiking_behaviour(sdpa: PreTrainedModel, tokens: Draws) -> None:
    ids = tokens(1, 20)
    dense = logits(sdpa, ids)
    conversion = stages.fit(sdpa, tokens(4, 16, seed=1), stages.Las(timesteps=3))
    assert torch.equal(logits(sdpa, ids), dense)
    with pytest.raises(RuntimeError, match="inside"), stages.patched(sdpa, conversion) as spiking:
        assert not torch.allclose(logits(spiking, ids), dense)
        raise RuntimeError("inside")
    assert torch.equal(logits(sdpa, ids), dense)


@pytest.mark.parametrize("how", ["save", "save_pretrained"])
def test_what_is_saved_comes_back_to_the_bit(
    how: str, sdpa: PreTrainedModel, tokens: Draws, tmp_path: Path
) -> None:
    """Also by transformers' own method, which must not write the dense model without a word."""
    ids = tokens(2, 24)
    stages.convert(sdpa, tokens(4, 16, seed=1), stages.SignedDigit(timesteps=5))
    before = logits(sdpa, ids)
    stages.save(sdpa, tmp_path) if how == "save" else sdpa.save_pretrained(tmp_path)
    assert torch.equal(logits(sdpa, ids), before)
    loaded = stages.load(tmp_path)
    assert torch.equal(logits(loaded, ids), before)
    stages.measure(loaded, tokens(2, 16, seed=3))
    assert torch.equal(logits(loaded, ids), before)
    again = tmp_path / "again"
    stages.save(loaded, again)
    assert torch.equal(logits(stages.load(again), ids), before)


def test_the_table_has_a_row_a_site(sdpa: PreTrainedModel, tokens: Draws) -> None:
    stages.convert(sdpa, tokens(4, 16, seed=1), stages.Gated(timesteps=4, grains=3))
    table = stages.table(sdpa)
    neurons = stages.conversion(sdpa).neurons
    assert list(table["site"]) == list(neurons.sites)
    assert list(table.columns[:6]) == ["site", "role", "layer", "nmse", "spikes", "bound_db"]
    assert table["nmse"].between(0, 1).all() and table["spikes"].between(0, 5).all()


def test_texts_are_cut_into_windows(
    tiny_llama: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = ["the first spike " * 8, "comes in time " * 8]
    options = {"length": 32, "tokenizer": byte_tokenizer}
    fitted = stages.fit(tiny_llama, texts, stages.Las(), **options)
    joined = "\n\n".join(texts).encode()
    ids = torch.tensor([int(byte_tokenizer.convert_tokens_to_ids(s)) for s in _symbols(joined)])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    same = stages.fit(tiny_llama, windows, stages.Las())
    assert all(
        torch.equal(v, same.neurons.fit.params[n]) for n, v in fitted.neurons.fit.params.items()
    )


def _symbols(text: bytes) -> list[str]:
    """The byte-level alphabet of GPT-2: a blank is Ġ, a line end Ċ."""
    return [{" ": "Ġ", "\n": "Ċ"}.get(chr(byte), chr(byte)) for byte in text]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, t: stages.restore(m), "stages.convert"),
        (lambda m, t: stages.table(m), "stages.convert"),
        (lambda m, t: stages.save(m, "somewhere"), "stages.convert"),
        (lambda m, t: stages.fit(m, "no ids", stages.Gated()), "tokenizer"),
        (lambda m, t: stages.fit(m, t(1, 10)[0], stages.Gated()), "10 tokens"),
        (lambda m, t: stages.Gated(timesteps=99), "99"),
        (lambda m, t: stages.fit(m, t(2, 16) + 40, stages.Las()), "token 8[0-9], .* 50 rows"),
        (lambda m, t: stages.fit(m, t(2, 16) - 48, stages.Las()), "0 or more: got -[0-9]"),
        (lambda m, t: stages.fit(m, t(2, 16) / 3, stages.Las()), "whole numbers: .*float32"),
        (lambda m, t: stages.fit(m, t(1, 257), stages.Las()), "has 256 positions; .*=257 to go"),
        (lambda m, t: stages.fit(m, t(1, 600)[0], stages.Las()), "512 tokens: .* 256 positions"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    call: Any, words: str, sdpa: PreTrainedModel, tokens: Draws
) -> None:
    with pytest.raises(InputError, match=words) as refused:
        call(sdpa, tokens)
    assert "\n" not in str(refused.value)


def test_what_is_measured_is_what_the_model_can_read(
    sdpa: PreTrainedModel, tiny: Callable[..., PreTrainedModel], tokens: Draws
) -> None:
    stages.convert(sdpa, tokens(4, 16, seed=1), stages.Las())
    with pytest.raises(InputError, match="has the token 5[0-9]"):
        stages.measure(sdpa, tokens(2, 16) + 10)
    sdpa.config.max_position_embeddings = 300  # as the refusal of longer windows says
    assert len(stages.measure(sdpa, tokens(1, 300))) == 21
    table = tiny("opt")
    with pytest.raises(InputError, match=r"256 positions; give windows of 256 tokens at most$"):
        stages.fit(table, tokens(1, 257), stages.Las())


def test_a_token_that_the_embedding_lacks_is_named(
    sdpa: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match="has the token [0-9]+ .'.'., and .* 50 rows"):
        stages.fit(sdpa, "first spike " * 9, stages.Las(), tokenizer=byte_tokenizer, length=32)


def test_a_spiking_model_is_not_converted_twice(sdpa: PreTrainedModel, tokens: Draws) -> None:
    text = tokens(4, 16, seed=1)
    stages.convert(sdpa, text, stages.Las())
    with pytest.raises(InputError, match=r"stages\.restore"):
        stages.convert(sdpa, text, stages.Gated())


def test_neurons_of_another_model_leave_it_dense(
    sdpa: PreTrainedModel, tiny: Callable[..., PreTrainedModel], tokens: Draws
) -> None:
    conversion = stages.fit(tiny("opt"), tokens(4, 16, seed=1), stages.Las())
    dense = logits(sdpa, tokens(1, 12))
    with pytest.raises(InputError, match="not in this model"):
        stages.bind(sdpa, conversion)
    assert torch.equal(logits(sdpa, tokens(1, 12)), dense)
    assert not hasattr(sdpa.config, "quantization_config")


def test_a_folder_with_files_is_not_written_over(
    sdpa: PreTrainedModel, tokens: Draws, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("kept")
    stages.convert(sdpa, tokens(4, 16, seed=1), stages.Las())
    with pytest.raises(InputError, match="not an empty folder"):
        stages.save(sdpa, tmp_path)
    with pytest.raises(InputError, match=r"mine/below cannot be made .Not a directory.; give"):
        stages.save(sdpa, tmp_path / "mine" / "below")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


CLASSES = {
    file.stem: OmegaConf.load(file)._target_.rpartition(".")[2]
    for file in sorted((CONF / "coding").glob("*.yaml"))
    if file.stem != "dense"
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_coding_has_the_defaults_of_its_yaml(name: str) -> None:
    """Of the yaml that has the class's own name; the others say how they differ."""
    kind = getattr(stages, CLASSES[name])
    default = kind()
    if default.name != name:
        assert all(f.default is not MISSING for f in fields(kind))
        return
    config = OmegaConf.create(
        {"timesteps": 6, "coding": OmegaConf.load(CONF / f"coding/{name}.yaml")}
    )
    assert instantiate(config, _convert_="all")["coding"] == default


def test_codings_are_found_by_their_names() -> None:
    assert set(CLASSES.values()) <= set(registered("coding"))
    with pytest.raises(AttributeError, match="no coding Gate; it has .*Gated"):
        _ = stages.Gate


def test_the_door_costs_nothing_before_it_is_used() -> None:
    code = (
        "import sys, stages; print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
