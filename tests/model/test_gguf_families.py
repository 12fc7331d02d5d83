"""GGUF files of every family that is read give the model that they were made of; others say why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from stages.errors import InputError
from stages.model.gguf_config import READ, check_stated
from stages.model.loading import convert_gguf, load
from tests.model.gguf_families import FAMILIES, write
from tests.model.test_formats import README

IDS = torch.arange(20, 42).view(2, 11)


def converted(folder: Path, name: str, **changed: object) -> Path:
    """The folder that a file of a family becomes; `changed` are numbers that it states otherwise."""
    family = FAMILIES[name]
    write(folder / "tiny.gguf", name, family.model(), family, changed)
    convert_gguf(folder / "tiny.gguf", folder / "out")
    return folder / "out"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_gives_the_model_that_it_was_made_of(name, tmp_path, caplog):
    out = converted(tmp_path, name)
    where = {"dtype": "float32", "device": "cpu", "revision": None, "device_map": None}
    model, tokenizer = load(str(out), **where)
    expected = FAMILIES[name].model()(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    text = "a <s>Größe 123\n\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert max(tokenizer.get_vocab().values()) == 257
    assert "another tokenizer" not in caplog.text and "behind" not in caplog.text


def test_every_family_is_read_and_named_in_the_readme():
    assert set(FAMILIES) == set(READ)
    listed = README.read_text().partition("**GGUF.**")[2].partition(". Others")[0]
    assert sorted(READ) == sorted(listed.partition("made of: ")[2].replace("`", "").split())


@pytest.mark.parametrize(
    "name",
    sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS, "gpt-oss", "minimax-m2"} - {*READ}),
)
def test_a_family_that_no_test_has_read_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"files of {name} are not read here .*model.path=FOLDER"):
        check_stated(None, {"general.architecture": name}, name, "GGUF file tiny.gguf")


LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("llama", LINEAR, "llama.rope.scaling.factor=8.0, and transformers makes nothing of it"),
        ("llama", {"rope.scaling.type": "yarn"}, "rope.scaling.type='yarn', .* makes 'none' of it"),
        ("llama", {"attention.scale": 0.5}, "llama.attention.scale=0.5, .* makes nothing of it"),
        ("llama", {"logit_scale": 0.5}, "llama.logit_scale=0.5"),
        ("gemma3", LINEAR, "gemma3.rope.scaling.factor=8.0"),
        ("gemma3", {"attention.sliding_window": 4}, None),
        ("gemma3", {"rope.freq_base": 5e5}, None),
        ("gemma2", {"attn_logit_softcapping": 20.0}, "attn_logit_softcapping=20.0, .* makes 50.0"),
        ("gemma2", {"final_logit_softcapping": 20.0}, "makes 30.0 of it"),
        ("gemma2", {"attention.key_length": 128}, "value_length=256, and transformers makes 128"),
        ("stablelm", {"rope.dimension_count": 4}, "rope.dimension_count=4, .* makes 2 of it"),
        ("starcoder2", {"rope.freq_base": 5e5}, "rope.freq_base=500000.0, .* makes 10000.0"),
        (
            "nemotron",
            {"attention.layer_norm_epsilon": 1e-3},
            "layer_norm_epsilon=0.001.*makes 1e-05",
        ),
        ("phi3", {"attention.sliding_window": 7}, "attention.sliding_window=7, .* makes nothing"),
        ("phi3", {"attention.sliding_window": 0}, None),
        ("qwen3moe", {"expert_used_count": 3}, None),
        ("falcon", {"attention.head_count_kv": 2}, "falcon.attention.head_count_kv=2, .* makes 1"),
    ],
)
def test_a_number_that_transformers_does_not_read_is_refused_by_name(name, changed, says, tmp_path):
    """None: it is read, or without effect."""
    family = FAMILIES[name]
    write(tmp_path / "tiny.gguf", name, family.model(), family, changed)
    metadata, _ = read_gguf_metadata(str(tmp_path / "tiny.gguf"))
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    if says is None:
        check_stated(config, metadata, name, "GGUF file tiny.gguf")
        return
    with pytest.raises(InputError, match=says) as error:
        check_stated(config, metadata, name, "GGUF file tiny.gguf")
    assert "\n" not in str(error.value)


def test_nothing_is_made_of_a_file_that_says_so(tmp_path):
    with pytest.raises(InputError, match=r"GGUF file tiny.gguf: it says llama.logit_scale=0.5"):
        converted(tmp_path, "llama", logit_scale=0.5)
    with pytest.raises(InputError, match="do not fit its config"):
        converted(tmp_path, "qwen2", **{"attention.head_count_kv": 1})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_divide_scores_otherwise(name, layers):
    """By the root of hidden_size / heads, which no number of the file says."""
    config = FAMILIES[name].model().config
    check_stated(config, {}, name, "GGUF file")
    config.num_hidden_layers = layers
    with pytest.raises(InputError, match=f"its {layers} layers are divided by the root of 8, and"):
        check_stated(config, {}, name, "GGUF file")


def test_a_split_that_the_class_of_a_family_replaces_is_refused(tmp_path):
    """Qwen2's is made by its class in place of the folder's."""
    family = FAMILIES["qwen2"]
    write(tmp_path / "tiny.gguf", "qwen2", family.model(), family, pre="starcoder")
    with pytest.raises(InputError, match=r"another tokenizer \(Qwen2Tokenizer\).* pre_tokenizer; "):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")


@pytest.mark.parametrize(("name", "pre"), [("starcoder2", "starcoder"), ("gpt2", "llama-bpe")])
def test_a_split_of_the_file_is_kept_where_the_family_has_another(name, pre, tmp_path):
    family = FAMILIES[name]
    write(tmp_path / "tiny.gguf", name, family.model(), family, pre=pre)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in saved.pre_tokenize_str("x1234")]
    assert pieces == {"starcoder": ["x", "1", "2", "3", "4"], "llama-bpe": ["x", "123", "4"]}[pre]
