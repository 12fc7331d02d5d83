"""What every quantiser writes is read as the numbers it stands for, or refused in one line, both ways."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.model import families
from tests.model.quantisers import FP4, REFUSED, four_bits, packed
from tests.model.test_files import configure, loaded, losses, refused, rewrite

Tensors = dict[str, Tensor]
SIZE = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 258}
DOWN = "model.layers.0.mlp.down_proj.weight"
README = Path(__file__).parents[2] / "stages" / "README.md"


@pytest.fixture
def folders(tmp_path, tiny, byte_tokenizer) -> Callable[..., list[Path]]:
    """Saves a model once for every change of its weights."""

    def save(model: object, *changes: Callable[[Tensors], Tensors]) -> list[Path]:
        there = []
        for number, change in enumerate(changes):
            there.append(tmp_path / str(number))
            made = tiny(model, **SIZE, num_hidden_layers=1) if isinstance(model, str) else model
            made.save_pretrained(there[-1])
            byte_tokenizer.save_pretrained(there[-1])
            rewrite(there[-1] / "model.safetensors", change)
        return there

    return save


def rows_of(heading: str) -> dict[str, str]:
    """The first and the last cell of the rows of a table of the README."""
    section = README.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[-1] for row in cells[2:]}


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_is_not_read_is_one_line_that_names_it(name, folders):
    quantiser = REFUSED[name]
    (folder,) = folders("llama", quantiser.write)
    if quantiser.spec:
        configure(folder, quantization_config=dict(quantiser.spec))
    for file, content in quantiser.beside.items():
        (folder / file).write_text(json.dumps(content))
    line = refused(folder)
    assert re.search(quantiser.says, line), line
    assert "dequantise it, write it by save_pretrained and give that folder" in line
    assert rows_of("Checkpoints")[f"`{name.partition(' ')[0]}`"].startswith("refused")


@pytest.mark.parametrize("name", REFUSED)
def test_its_codes_are_refused_also_where_no_config_names_it(name, folders):
    (folder,) = folders("qwen2", REFUSED[name].write)
    kinds = "I8|I32|U8|U32|F8_E4M3"
    said = f"weights are ({kinds}), the first is model.layers.0.* that no quantization_config"
    assert re.search(said, refused(folder))


@pytest.mark.parametrize(
    "spec", [REFUSED["gptq"].spec, {"quant_method": "fp8"}, {"load_in_4bit": True}]
)
def test_a_method_in_the_config_of_plain_weights_is_refused(spec, folders):
    (folder,) = folders("llama", dict)
    configure(folder, quantization_config=dict(spec))
    assert re.search(
        "says that it is quantised by .*, and its files hold no codes", refused(folder)
    )


def mxfp4(weight: Tensor) -> tuple[Tensors, Tensor]:
    """Blocks and scales of experts [experts, inputs, outputs], and the numbers that they stand for."""
    parts = weight.transpose(1, 2).unflatten(2, (-1, 32))
    power = (parts.abs().amax(3) / 6).log2().ceil()
    codes = four_bits(parts / torch.exp2(power)[..., None])
    numbers = FP4[codes % 8] * (1 - 2 * (codes // 8)) * torch.exp2(power)[..., None]
    kept = {"_blocks": packed(codes, 4, torch.uint8), "_scales": (power + 127).to(torch.uint8)}
    return kept, numbers.flatten(2).transpose(1, 2).contiguous()


def four_bit(weights: Tensors) -> Tensors:
    kept: Tensors = {}
    for name, weight in weights.items():
        expert = name.endswith(("gate_up_proj", "down_proj"))
        kept |= {f"{name}{e}": t for e, t in mxfp4(weight)[0].items()} if expert else {name: weight}
    return kept


def four_bit_dense(weights: Tensors) -> Tensors:
    ends = ("gate_up_proj", "down_proj")
    return {n: mxfp4(w)[1] if n.endswith(ends) else w for n, w in weights.items()}


@pytest.fixture
def experts(folders) -> list[Path]:
    """gpt-oss in MXFP4, and as the numbers that it stands for."""
    model = families.made("gpt_oss", **(SIZE | {"head_dim": 10}))
    there = folders(model, four_bit, four_bit_dense)
    configure(there[0], quantization_config={"quant_method": "mxfp4"})
    return there


def test_mxfp4_is_the_dense_model_of_its_codes_and_scales(experts, tokens, tmp_path, caplog):
    expected = losses(experts[1], tokens(3, 12))
    assert losses(experts[0], tokens(3, 12)) == expected and expected[0] == expected[1]
    assert not caplog.text
    for dtype in ("bfloat16", "float16"):
        one, other = (loaded(folder, dtype)[0].state_dict() for folder in experts)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    loaded(experts[0])[0].save_pretrained(tmp_path / "again")
    again, there = (load_file(f / "model.safetensors") for f in (tmp_path / "again", experts[1]))
    assert again.keys() == there.keys() and all(torch.equal(again[k], there[k]) for k in there)
    assert rows_of("Checkpoints")["`mxfp4`"].startswith("read")


BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"
SCALES = BLOCKS.replace("blocks", "scales")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {n: t for n, t in w.items() if n != SCALES}, f"its files lack {SCALES}"),
        (lambda w: w | {SCALES: w[SCALES].float()}, f"{SCALES} is F32, and scales are U8"),
        (
            lambda w: w | {SCALES: w[SCALES][..., :1].clone()},
            "no whole number of blocks of 16 bytes",
        ),
        (lambda w: w | {"x_scales": w[SCALES].clone()}, "1 weights are U8, the first is x_scales"),
    ],
)
def test_mxfp4_whose_scales_do_not_fit_is_refused(change, says, experts):
    rewrite(experts[0] / "model.safetensors", change)
    assert says in refused(experts[0])


Change = Callable[[Tensors], Tensors]


def powers(kind: torch.dtype, ends: tuple[str, ...] = ("_proj.weight",)) -> tuple[Change, Change]:
    """FP8 with a power of two for 32 weights of a row, stored as `kind`; and the numbers."""

    def parts(weight: Tensor) -> tuple[Tensor, Tensor]:
        parts = weight.unflatten(1, (-1, 32))
        power = (parts.abs().amax(2) / 448).log2().ceil()
        return (parts / torch.exp2(power)[..., None]).to(torch.float8_e4m3fn), power

    def eight(weights: Tensors) -> Tensors:
        kept = dict(weights)
        for name in (name for name in weights if name.endswith(ends)):
            codes, power = parts(weights[name])
            byte = (power + 127).to(torch.uint8)
            kept[name] = codes.flatten(1)
            kept[f"{name}_scale_inv"] = byte if kind == torch.uint8 else torch.exp2(power).to(kind)
        return kept

    def dense(weights: Tensors) -> Tensors:
        made = {name: parts(weight) for name, weight in weights.items() if name.endswith(ends)}
        numbers = {
            n: (c.float() * torch.exp2(p)[..., None]).flatten(1) for n, (c, p) in made.items()
        }
        return weights | numbers

    return eight, dense


def eight_bit(method: str) -> dict[str, object]:
    return {"quant_method": method, "weight_block_size": [1, 32], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("fp8", torch.uint8),
        ("fp8", torch.float8_e8m0fnu),
        ("mxfp8", torch.uint8),
    ],
    ids=str,
)
def test_fp8_scales_may_be_powers_of_two(method, kind, folders, tokens):
    eight, dense = folders("llama", *powers(kind))
    configure(eight, quantization_config=eight_bit(method))
    expected = losses(dense, tokens(3, 12))
    assert losses(eight, tokens(3, 12)) == expected and expected[0] == expected[1]
    assert rows_of("Checkpoints")[f"`{method}`"].startswith("read")


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_in_fp8_is_dequantised_both_ways(tied, tiny, folders, tokens):
    """With a head that is tied to it, and with one that its files hold beside it."""
    model = tiny("llama", **SIZE, tie_word_embeddings=tied)
    eight, dense = folders(model, *powers(torch.bfloat16, ("_proj.weight", "embed_tokens.weight")))
    configure(eight, quantization_config=eight_bit("fp8"))
    expected = losses(dense, tokens(3, 12))
    assert losses(eight, tokens(3, 12)) == expected and expected[0] == expected[1]
    assert all(m.config.tie_word_embeddings == tied for m in loaded(eight))


def test_a_head_in_fp8_that_the_config_ties_stays_a_head(tiny, folders, tokens, caplog):
    model = tiny("llama", **SIZE, tie_word_embeddings=False)
    eight, dense = folders(model, *powers(torch.bfloat16, ("_proj.weight", "lm_head.weight")))
    configure(eight, quantization_config=eight_bit("fp8"), tie_word_embeddings=True)
    expected = losses(dense, tokens(3, 12))
    assert losses(eight, tokens(3, 12)) == expected and expected[0] == expected[1]
    said = ["but its files hold two different tensors" in r.message for r in caplog.records]
    assert said == [True, True]


def test_every_format_of_the_table_is_one_that_a_test_has_made():
    named = {f"`{name.partition(' ')[0]}`" for name in REFUSED}
    read = {"none", "`fp8`", "`mxfp8`", "`mxfp4`"}
    assert rows_of("Checkpoints").keys() == named | read | {"any other"}
