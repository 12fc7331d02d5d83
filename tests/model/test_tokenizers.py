"""A tokenizer that transformers makes otherwise than tokenizer.json says is said, and so are its tokens
that the model lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, processors
from tokenizers import pre_tokenizers as splitting

from stages.errors import InputError
from stages.model.limits import check_tokens, vocabulary
from stages.model.loading import load, load_offloaded, load_tokenizer
from stages.model.offload import Offload
from stages.model.tokenizers import PROBE

WHERE: dict[str, Any] = {"dtype": "float32", "device": "cpu", "revision": None}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.fixture
def saved(tmp_path, tiny, byte_tokenizer) -> Callable[..., Path]:
    """Saves a model of a kind and the tokenizer of bytes with a change."""

    def save(kind: str, change: Callable[[Tokenizer], None], rows: int = 259) -> Path:
        tiny(kind, vocab_size=rows).save_pretrained(tmp_path)
        byte_tokenizer.save_pretrained(tmp_path)
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    return save


def qwen2(tokenizer: Tokenizer) -> None:
    """As Qwen2's tokenizer.json has it."""
    tokenizer.normalizer = normalizers.NFC()
    split = splitting.Split(Regex(QWEN2), "isolated")
    unsplit = splitting.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.pre_tokenizer = splitting.Sequence([split, unsplit])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])


def digits(tokenizer: Tokenizer) -> None:
    """Every three digits a token, which Qwen2's class does not do."""
    qwen2(tokenizer)
    split = splitting.Split(Regex(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated")
    unsplit = splitting.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = splitting.Sequence([split, unsplit])


def composed(tokenizer: Tokenizer) -> None:
    qwen2(tokenizer)
    tokenizer.normalizer = normalizers.NFKC()


def begun(tokenizer: Tokenizer) -> None:
    qwen2(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 256)]
    )


def as_it_is(tokenizer: Tokenizer) -> None:
    pass


def said(folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of a model in memory, of one in files and of a tokenizer alone, which are the same."""
    lines = []
    for read in (
        lambda: load(str(folder), device_map=None, **WHERE),
        lambda: load_offloaded(str(folder), offload=Offload("memory"), **WHERE),
        lambda: load_tokenizer(str(folder), None),
    ):
        caplog.clear()
        read()
        lines.append([r.message.removeprefix(f"model {folder}: ") for r in caplog.records])
    assert lines[0] == lines[1] == lines[2] and not [line for line in lines[0] if "\n" in line]
    return lines[0]


@pytest.mark.parametrize(
    ("kind", "change"),
    [("llama", as_it_is), ("qwen2", qwen2), ("qwen2", begun), ("gpt_neox", as_it_is)],
)
def test_a_tokenizer_that_is_the_one_of_its_file_is_not_mentioned(kind, change, saved, caplog):
    assert said(saved(kind, change), caplog) == []


@pytest.mark.parametrize(
    ("change", "parts", "probe"),
    [
        (digits, "pre_tokenizer", "the same ids"),  # of a vocabulary of bytes
        (composed, "normalizer", "other ids"),
        (as_it_is, "normalizer, pre_tokenizer, added tokens", "other ids"),
    ],
)
def test_one_that_a_class_makes_otherwise_is_one_line(change, parts, probe, saved, caplog):
    (line,) = said(saved("qwen2", change), caplog)
    assert f"another tokenizer (Qwen2Tokenizer) than its tokenizer.json, by {parts}; " in line
    assert f"a probe text has {probe}" in line


def test_ids_differ_where_it_says_so(saved, byte_tokenizer):
    """The warning is about what a text becomes."""
    folder = saved("qwen2", composed)
    there = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROBE).ids
    assert load_tokenizer(str(folder), None)(PROBE).input_ids != there
    qwen2(kept := Tokenizer.from_file(str(folder / "tokenizer.json")))
    assert load_tokenizer(str(folder), None)(PROBE).input_ids == kept.encode(PROBE).ids


def test_a_token_that_tokenizer_config_adds_is_said(saved, caplog):
    folder = saved("llama", as_it_is, rows=258)
    file = folder / "tokenizer_config.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"pad_token": "[PAD]"}))
    behind, other = said(folder, caplog)
    assert "than its tokenizer.json, by added tokens; a probe text has the same ids" in other
    assert "1 tokens of its tokenizer, 1 of them added ones, are behind the 258 rows" in behind
    assert "the first is '[PAD]' (258); a text with one is refused" in behind


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (258, None),
        (300, None),
        (257, "1 tokens of its tokenizer, 1 of them added ones, are behind the 257 rows of its"),
        (200, "58 tokens of its tokenizer, 2 of them added ones, are behind the 200 rows of its"),
    ],
)
def test_tokens_that_the_embedding_lacks_are_said_at_once(rows, line, saved, caplog):
    folder = saved("llama", as_it_is, rows)
    lines = said(folder, caplog)
    assert [line in each for each in lines] == ([True] if line else [])
    model, tokenizer = load(str(folder), device_map=None, **WHERE)
    assert vocabulary(model.config) == rows == model.get_input_embeddings().num_embeddings
    ids = tokenizer("Some text</s>").input_ids
    if line is None:
        model(tokenizer("Some text</s>", return_tensors="pt").input_ids)
        check_tokens(ids, rows, "a text", tokenizer)
        return
    with pytest.raises(InputError, match="a text has the token 257 .'</s>'."):
        check_tokens(ids, rows, "a text", tokenizer)


def test_a_token_added_behind_a_padded_embedding_is_none_behind(saved, caplog):
    def add(tokenizer: Tokenizer) -> None:
        tokenizer.add_special_tokens([AddedToken("<more>", special=True)])

    assert said(saved("llama", add, rows=320), caplog) == []
    (line,) = said(saved("llama", add, rows=258), caplog)
    assert "the first is '<more>' (258)" in line
