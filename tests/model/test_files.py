"""A folder gives one model, in memory and from disk, or one line that says why it gives none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import stages
from stages.checkpoint.folder import save
from stages.codings.gated import Gated
from stages.errors import InputError
from stages.evaluation import perplexity
from stages.model.loading import load, load_offloaded
from stages.model.offload import Offload
from stages.transforms.transform import Untouched

Tensors = dict[str, Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
COMMIT = 10 * "0123"  # of a model on the hub


@pytest.fixture
def saved(tmp_path, tiny, byte_tokenizer) -> Callable[..., Path]:
    """Saves a tiny model, whole or in shards of 10 kB."""

    def save(kind: str = "llama", shards: str = "1GB", **config: object) -> Path:
        made = tiny(kind, **{"vocab_size": 258, **config})  # as many as the tokenizer has
        made.save_pretrained(tmp_path / "model", max_shard_size=shards)
        byte_tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    weights = change(load_file(file))
    save_file(weights, file, metadata={"format": "pt"})


def configure(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def loaded(folder: Path, dtype: str = "float32") -> list[PreTrainedModel]:
    """In memory and from disk."""
    where = {"dtype": dtype, "device": "cpu", "revision": None}
    whole, _ = load(str(folder), device_map=None, **where)
    lazy, _ = load_offloaded(str(folder), offload=Offload("memory"), **where)
    return [whole, lazy]


def losses(folder: Path, ids: Tensor) -> list[float]:
    return [float(perplexity(m, ids, None, 2, "text").metrics["nll"]) for m in loaded(folder)]


def refused(folder: Path) -> str:
    """The one line that both ways of loading say."""
    where = {"dtype": "float32", "device": "cpu", "revision": None}
    with pytest.raises(InputError) as whole:
        load(str(folder), device_map=None, **where)
    with pytest.raises(InputError) as lazy:
        load_offloaded(str(folder), offload=Offload("memory"), **where)
    assert str(whole.value) == str(lazy.value) and "\n" not in str(whole.value)
    return str(whole.value)


def biased(weights: Tensors) -> Tensors:
    return weights | {
        name.replace("weight", "bias"): weight[:, 0].clone()
        for name, weight in weights.items()
        if "q_proj" in name
    }


def deeper(weights: Tensors) -> Tensors:
    third = {n.replace("layers.1", "layers.2"): w.clone() for n, w in weights.items() if ".1." in n}
    return weights | third


def coded(weights: Tensors) -> Tensors:
    return {n: (w * 99).to(torch.int8) if "_proj" in n else w for n, w in weights.items()}


def without(weights: Tensors, name: str = UP) -> Tensors:
    return {key: weight for key, weight in weights.items() if key != name}


def wider(weights: Tensors) -> Tensors:
    return weights | {UP: torch.ones(41, 24)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            biased,
            "hold 2 weights that a LlamaForCausalLM of its config has no place for, the first ",
        ),
        (
            deeper,
            "hold 9 weights that a LlamaForCausalLM of its config has no place for, the first ",
        ),
        (coded, "14 weights are I8, the first is model.layers.0.mlp.down_proj.weight"),
        (without, f"lack 1 weights, the first is {UP}"),
        (
            wider,
            f"1 weights do not fit its config, the first is {UP}: [41, 24] in its files, [40, 24]",
        ),
        (lambda w: without(w, HEAD), f"lack 1 weights, the first is {HEAD}"),
    ],
)
def test_files_that_are_not_the_model_of_the_config_are_refused_by_name(change, says, saved):
    folder = saved()
    rewrite(folder / "model.safetensors", change)
    assert says in refused(folder)


def buffers(weights: Tensors) -> Tensors:
    """As old checkpoints have them; integers too."""
    return weights | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(5, dtype=torch.int64),
    }


def masks(weights: Tensors) -> Tensors:
    """As the checkpoints of Pythia have them."""
    layers = [name.removesuffix("dense.weight") for name in weights if "attention.dense.w" in name]
    return (
        weights
        | {f"{layer}bias": torch.ones(1, 1, 8, 8, dtype=torch.bool) for layer in layers}
        | {f"{layer}masked_bias": torch.tensor(-1e9) for layer in layers}
    )


@pytest.mark.parametrize(("kind", "change"), [("llama", buffers), ("gpt_neox", masks)])
def test_what_transformers_ignores_by_design_is_ignored(kind, change, saved, tokens):
    folder = saved(kind)
    before = losses(folder, tokens(2, 12))
    rewrite(folder / "model.safetensors", change)
    assert losses(folder, tokens(2, 12)) == before and before[0] == before[1]


def unnamed(folder: Path, index: dict[str, str]) -> None:
    del index[UP]


def elsewhere(folder: Path, index: dict[str, str]) -> None:
    index[UP] = next(file for file in index.values() if file != index[UP])


def invented(folder: Path, index: dict[str, str]) -> None:
    index["model.layers.1.mlp.no.weight"] = index[UP]


def twice(folder: Path, index: dict[str, str]) -> None:
    other = next(file for file in sorted(set(index.values())) if file != index[UP])
    rewrite(folder / other, lambda weights: weights | {UP: torch.ones(40, 24)})


def gone(folder: Path, index: dict[str, str]) -> None:
    (folder / index[UP]).unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (unnamed, f"its shards hold 1 weights that its index does not name, the first is {UP}"),
        (elsewhere, f"its index names {UP} in model-0000"),
        (invented, "its index names model.layers.1.mlp.no.weight in model-0000"),
        (twice, f"{UP} is in model-0000"),
        (gone, "which its index names"),
        (lambda folder, index: index.clear(), "its model.safetensors.index.json names no tensors"),
    ],
)
def test_shards_and_their_index_agree_or_are_refused(change, says, saved):
    folder = saved(shards="10KB")
    file = folder / "model.safetensors.index.json"
    whole = json.loads(file.read_text())
    change(folder, whole["weight_map"])
    file.write_text(json.dumps(whole))
    assert says in refused(folder)


def test_a_whole_file_beside_an_index_is_what_is_read_both_ways(saved, tokens):
    folder = saved(shards="10KB")
    before = losses(folder, tokens(2, 12))
    weights: Tensors = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    weights[UP] = torch.zeros(40, 24)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    after = losses(folder, tokens(2, 12))
    assert after[0] == after[1] and after != before


def test_a_head_of_its_own_stays_though_the_config_ties_it(saved, tokens, caplog):
    folder, ids = saved(), tokens(3, 12)
    expected = losses(folder, ids)
    assert not caplog.text
    configure(folder, tie_word_embeddings=True)
    assert losses(folder, ids) == expected and expected[0] == expected[1]
    said = f"its config.json ties {HEAD} to {EMBEDDING}, but its files hold two different tensors"
    assert [said in record.message for record in caplog.records] == [True, True]
    for model in loaded(folder):
        assert not model.config.tie_word_embeddings and model.lm_head.weight is not (
            model.get_input_embeddings().weight
        )
        assert HEAD not in model.all_tied_weights_keys
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert float(perplexity(theirs, ids, None, 2, "text").metrics["nll"]) == expected[0]


def test_such_a_head_is_exported_with_the_model(saved, tmp_path, convert):
    folder = saved()
    configure(folder, tie_word_embeddings=True)
    model, _ = loaded(folder)
    save(model, convert(model, Gated("gated", 4, 2)), Untouched(), (), tmp_path / "spiking")
    found = stages.load(str(tmp_path / "spiking"))
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(found.lm_head.weight, found.get_input_embeddings().weight)


@pytest.mark.parametrize("left", [(HEAD, EMBEDDING), (HEAD,), (EMBEDDING,)], ids=str)
def test_one_tensor_for_both_is_a_tie_wherever_it_is(left, saved, tokens, caplog):
    folder, ids = saved(tie_word_embeddings=True), tokens(3, 12)
    expected = losses(folder, ids)
    rewrite(
        folder / "model.safetensors",
        lambda w: without(w, EMBEDDING) | {name: w[EMBEDDING].clone() for name in left},
    )
    assert losses(folder, ids) == expected and expected[0] == expected[1]
    for model in loaded(folder):
        assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not caplog.text


def test_tied_weights_that_are_both_absent_are_refused(saved):
    folder = saved(tie_word_embeddings=True)
    rewrite(folder / "model.safetensors", lambda weights: without(weights, EMBEDDING))
    assert "its files lack 2 weights, the first is lm_head.weight" in refused(folder)


def test_a_model_on_the_hub_is_read_as_a_folder_is(saved, tokens, tmp_path, monkeypatch):
    folder = saved(shards="10KB")
    expected = losses(folder, tokens(2, 12))
    cached = tmp_path / "hub" / "models--org--tiny"  # as if downloaded before
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert losses(Path("org/tiny"), tokens(2, 12)) == expected
    shard = sorted((cached / "snapshots" / COMMIT).glob("*.safetensors"))[-1]
    rewrite(shard, lambda weights: weights | {"more.weight": torch.ones(2)})
    assert "1 weights that its index does not name, the first is more.weight" in refused(
        Path("org/tiny")
    )
