"""A GGUF file splits text as it names it, and no tensor of it is left out."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaForCausalLM, Qwen2Tokenizer
from transformers.integrations.gguf import read_gguf_metadata

from stages.errors import InputError
from stages.model.gguf_file import check_read, read_tokenizer
from stages.model.loading import convert_gguf
from stages.model.tokenizers import PROBE
from tests.model.test_loading import write_gguf
from tests.text.token_kinds import LLAMA3, text

MERGES = [("Ċ", "Ċ"), ("1", "2"), ("12", "3"), ("4", "5"), ("!", "?"), ("!?", "a")]
WHOLE = "xyz"  # a token that no merges lead to
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in MERGES), WHOLE]


def tokenizer_of(folder: Path, pre: str | None) -> Any:
    """That of a file with a vocabulary alone."""
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_token_types([1] * len(TOKENS))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, _ = read_gguf_metadata(str(folder / "tiny.gguf"))
    return read_tokenizer(folder / "tiny.gguf", metadata, "GGUF file tiny.gguf")


@pytest.mark.parametrize(
    ("pre", "words", "pieces"),
    [
        # By hand from the pattern of each: a line break in front of a number stays alone in GPT-2's.
        ("gpt-2", "a\n\n12", "a Ċ Ċ 12"),
        ("smollm", "a\n\n12", "a ĊĊ 1 2"),
        ("starcoder", "a\n\n12", "a ĊĊ 1 2"),
        ("qwen2", "a\n\n12", "a ĊĊ 1 2"),
        ("llama-bpe", "a\n\n12", "a ĊĊ 12"),
        ("gpt-2", "12345", "123 45"),
        ("smollm", "12345", "1 2 3 4 5"),
        ("llama-bpe", "12345", "123 45"),
        ("default", "12345", "123 45"),
        ("gpt-2", "!?a", "!? a"),
        ("smollm", "xyz", "x y z"),
        ("llama-bpe", "xyz", "xyz"),
        ("smollm", " 1½2", "Ġ 1 Â ½ 2"),
    ],
)
def test_text_is_split_as_the_file_names_it(pre, words, pieces, tmp_path):
    tokenizer = tokenizer_of(tmp_path, pre)
    assert tokenizer.tokenize(words) == pieces.split()
    assert tokenizer.decode(tokenizer(words).input_ids) == words


def llama3(vocabulary: dict[str, int]) -> Any:
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES, ignore_merges=True))
    unsplit = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, unsplit])
    return made


@pytest.mark.parametrize(
    ("pre", "own"),
    [
        ("gpt-2", lambda v: GPT2Tokenizer(vocab=v, merges=MERGES).backend_tokenizer),
        ("qwen2", lambda v: Qwen2Tokenizer(vocab=v, merges=MERGES).backend_tokenizer),
        ("llama-bpe", llama3),
    ],
    ids=["gpt-2", "qwen2", "llama-bpe"],
)
def test_ids_are_those_of_the_tokenizer_of_the_family(pre, own, tmp_path):
    read, own = tokenizer_of(tmp_path, pre), own({token: i for i, token in enumerate(TOKENS)})
    for words in (PROBE, "cafe\u0301\n\n12345!?a xyz", *(text(seed, 400) for seed in range(8))):
        assert read(words, add_special_tokens=False).input_ids == own.encode(words).ids


@pytest.mark.parametrize("pre", ["default", None])
def test_a_file_that_names_no_known_tokenizer_is_read_with_a_warning(pre, tmp_path, caplog):
    tokenizer = tokenizer_of(tmp_path, pre)
    assert "its tokenizer.ggml.pre is 'default'" in caplog.text
    assert tokenizer.tokenize("a!?12345") == ["a", "!?", "123", "45"]


def test_a_name_that_is_not_known_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer.ggml.pre is 'nosuch'.*smollm") as error:
        tokenizer_of(tmp_path, "nosuch")
    assert "\n" not in str(error.value)


def test_what_is_saved_splits_likewise(tmp_path, tiny_llama, byte_tokenizer):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama, byte_tokenizer, pre="smollm")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    saved: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    pieces = saved.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12")
    assert [piece for piece, _ in pieces] == ["a", "ĊĊ", "1", "2"]
    assert saved("<s>1</s>").input_ids == [256, byte_tokenizer("1").input_ids[0], 257]


def test_a_tensor_that_transformers_leaves_out_is_refused_by_name(
    tmp_path, tiny_llama, byte_tokenizer
):
    """The frequencies of Llama 3.1, without which its positions are others."""
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_llama, byte_tokenizer, more={"rope_freqs.weight": torch.ones(4)})
    with pytest.raises(InputError, match=r"leaves 1 of its tensors out, the first is rope_freqs"):
        convert_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


OPTIONAL = {"rope_freqs", "rope_factors_long", "rope_factors_short", "blk.{bid}.attn_rot_embd"}
EXPERTS = {
    "blk.{bid}.ffn_gate_inp",
    *(f"blk.{{bid}}.ffn_{part}_exps" for part in ("gate", "down", "up")),
}
APART = {f"blk.{{bid}}.attn_{port}" for port in "qkv"}  # of Phi-3, which has one matrix for them


@pytest.mark.parametrize(
    ("kind", "name", "without"),
    [
        ("llama", "llama", OPTIONAL | EXPERTS),
        ("qwen2", "qwen2", OPTIONAL),
        ("qwen3", "qwen3", OPTIONAL),
        ("qwen3_moe", "qwen3moe", OPTIONAL),
        ("gemma3_text", "gemma3", OPTIONAL),
        ("phi3", "phi3", OPTIONAL | APART),
    ],
)
def test_every_tensor_that_a_family_has_in_a_file_is_one_that_is_read(kind, name, without, tiny):
    """By the tables of the package that writes such files."""
    (arch,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    parts = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]} - without
    names = [f"{part.format(bid=1)}.weight" for part in parts]
    assert len(names) > 8
    check_read(tiny(kind), name, names, "GGUF file")
    with pytest.raises(
        InputError, match=r"leaves 1 of its tensors out, the first is blk.1.nothing"
    ):
        check_read(tiny(kind), name, [*names, "blk.1.nothing.weight"], "GGUF file")


def test_a_tensor_that_the_file_lacks_is_refused_by_name(tmp_path, tiny_llama, byte_tokenizer):
    file, short = tmp_path / "tiny.gguf", LlamaForCausalLM(tiny_llama.config)
    del short.model.layers[1].mlp.up_proj
    write_gguf(file, short, byte_tokenizer)
    says = r"lack 1 weights, the first is model.layers.1.mlp.up_proj.weight"
    with pytest.raises(InputError, match=says):
        convert_gguf(file, tmp_path / "out")
