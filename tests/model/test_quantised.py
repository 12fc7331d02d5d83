"""Quantised checkpoints: FP8 with its scales is the dense model it stands for, the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import stages
from stages.checkpoint.folder import save
from stages.codings.gated import Gated
from stages.model.loading import load
from stages.transforms.transform import Untouched
from tests.model.test_files import configure, loaded, losses, refused, rewrite

Tensors = dict[str, Tensor]
SCALE = "_scale_inv"
ROWS, COLUMNS = 10, 8  # of a block
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [ROWS, COLUMNS]}
DIMS = {"head_dim": 10, "hidden_size": 40, "intermediate_size": 40}
DOWN = "model.layers.0.mlp.down_proj.weight"


def blocks(weights: Tensors) -> tuple[Tensors, Tensors]:
    """Codes with a scale for every block, and the numbers that they stand for."""
    codes, dense = {}, {}
    for name, weight in weights.items():
        if "_proj" not in name:
            codes[name] = dense[name] = weight
            continue
        parts = [row.split(COLUMNS, dim=1) for row in weight.split(ROWS)]
        scales = torch.tensor([[float(part.abs().max()) / 448 for part in row] for row in parts])
        pairs = [list(zip(row, each, strict=True)) for row, each in zip(parts, scales, strict=True)]
        rounded = [[(part / scale).to(torch.float8_e4m3fn) for part, scale in row] for row in pairs]
        codes[name] = torch.cat([torch.cat(row, 1) for row in rounded])
        codes[name + SCALE] = scales
        numbers = [
            torch.cat([code.float() * scale for code, scale in zip(row, each, strict=True)], 1)
            for row, each in zip(rounded, scales, strict=True)
        ]
        dense[name] = torch.cat(numbers)
    return codes, dense


def whole(weights: Tensors) -> tuple[Tensors, Tensors]:
    """Codes with one scale for a matrix."""
    codes, dense = {}, {}
    for name, weight in weights.items():
        codes[name] = dense[name] = weight
        if "_proj" in name:
            scale = weight.abs().max() / 448
            codes[name] = (weight / scale).to(torch.float8_e4m3fn)
            shape = (1, 1) if "down" in name else ()  # both are written
            codes[name + SCALE] = scale.reshape(shape)
            dense[name] = codes[name].float() * scale
    return codes, dense


@pytest.fixture
def quantised(tmp_path, tiny, byte_tokenizer) -> Callable[..., tuple[Path, Path]]:
    """A folder in FP8, and one of the numbers that it stands for."""

    def make(kind: str = "llama", how: Callable = blocks, **config: object) -> tuple[Path, Path]:
        folders = (tmp_path / "fp8", tmp_path / "dense")
        model = tiny(kind, **DIMS, **config)
        for number, folder in enumerate(folders):
            model.save_pretrained(folder)
            byte_tokenizer.save_pretrained(folder)
            rewrite(folder / "model.safetensors", lambda w, n=number: how(w)[n])
        one = {"weight_block_size": None} if how is whole else {}
        configure(folders[0], quantization_config=FP8 | one)
        return folders

    return make


@pytest.mark.parametrize(
    ("kind", "how"), [("llama", blocks), ("llama", whole), ("qwen3", blocks), ("mixtral", blocks)]
)
def test_fp8_is_the_dense_model_of_its_codes_and_scales(kind, how, quantised, tokens):
    fp8, dense = quantised(kind, how)
    expected = losses(dense, tokens(3, 12))
    assert losses(fp8, tokens(3, 12)) == expected and expected[0] == expected[1]
    bare = {n: w.float() for n, w in load_file(fp8 / "model.safetensors").items() if SCALE not in n}
    save_file(bare, dense / "model.safetensors", metadata={"format": "pt"})
    assert abs(losses(dense, tokens(3, 12))[0] - expected[0]) > 0.01  # codes without scales


def test_fp8_in_bfloat16_is_rounded_once(quantised):
    fp8, dense = quantised()
    for one, other in zip(loaded(fp8, "bfloat16"), loaded(dense, "bfloat16"), strict=True):
        weights = one.state_dict(), other.state_dict()
        assert all(w.dtype == torch.bfloat16 for w in weights[0].values())
        assert weights[0].keys() == weights[1].keys()
    whole_one, whole_other = loaded(fp8, "bfloat16")[0], loaded(dense, "bfloat16")[0]
    pairs = zip(whole_one.parameters(), whole_other.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_fp8_is_exported_as_the_numbers_it_stands_for(quantised, convert, tmp_path):
    fp8, dense = quantised()
    where = {"dtype": "float32", "device": "cpu", "revision": None, "device_map": None}
    model, _ = load(str(fp8), **where)
    save(model, convert(model, Gated("gated", 4, 2)), Untouched(), (), tmp_path / "spiking")
    found = stages.load(str(tmp_path / "spiking")).state_dict()
    for name, weight in load_file(dense / "model.safetensors").items():
        assert torch.equal(found[name], weight)


def test_fp8_is_dequantised_also_where_a_device_computes_in_it(quantised, tokens, monkeypatch):
    """Its activations would be rounded to FP8 there."""
    fp8, dense = quantised()
    expected = losses(dense, tokens(2, 12))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    assert losses(fp8, tokens(2, 12)) == expected


def unscaled(weights: Tensors) -> Tensors:
    return {name: weight for name, weight in weights.items() if name != DOWN + SCALE}


def seven(weights: Tensors) -> Tensors:
    return weights | {DOWN + SCALE: torch.ones(4, 7)}


def halves(weights: Tensors) -> Tensors:
    """Two blocks for 40 rows: transformers would take two equal ones, a writer one of 32 and the rest."""
    return weights | {DOWN + SCALE: torch.ones(2, 5)}


def surplus(weights: Tensors) -> Tensors:
    return weights | {DOWN.replace("weight", "input_scale"): torch.ones(())}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (unscaled, f"{DOWN} is F8_E4M3, and its files lack {DOWN}{SCALE}"),
        (seven, f"{DOWN} [40, 40] is no whole number of blocks [10, 8], [4, 7] of them"),
        (halves, f"{DOWN} [40, 40] is no whole number of blocks [10, 8], [2, 5] of them"),
        (surplus, "no place for, the first is model.layers.0.mlp.down_proj.input_scale"),
    ],
)
def test_fp8_whose_scales_do_not_fit_is_refused(change, says, quantised):
    folder, _ = quantised()
    rewrite(folder / "model.safetensors", change)
    assert says in refused(folder)


def test_fp8_that_no_config_names_is_refused(quantised):
    folder, _ = quantised()
    configure(folder, quantization_config=None)
    assert f"14 weights are F8_E4M3, the first is {DOWN}" in refused(folder)
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}}))
    assert "is quantised by ModelOpt (its hf_quant_config.json)" in refused(folder)


def test_a_config_that_names_no_method_is_that_of_plain_weights(quantised, tokens):
    _, folder = quantised()
    expected = losses(folder, tokens(3, 12))
    configure(folder, quantization_config={})
    assert losses(folder, tokens(3, 12)) == expected
