"""Folders of spiking models that are damaged or do not fit their config: refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import stages
from stages.checkpoint.saved import save
from stages.codings.gated import Gated
from stages.errors import InputError
from stages.patching import Conversion
from stages.ports.kernels import use_compiler
from stages.transforms.transforms import Untouched

SCALE = "spiking_neurons.scale"
UP = "model.layers.1.mlp.up_proj.weight"
Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    tiny: Callable[..., PreTrainedModel],
    convert: Callable[..., Conversion],
) -> Path:
    """A saved spiking model, which stays as it is."""
    use_compiler(False)
    model, out = tiny(), tmp_path_factory.mktemp("whole")
    save(model, convert(model, Gated("gated", 4, 2)), Untouched(), (), out)
    return out


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "spiking"))


def edited(folder: Path, change: Callable[[Config], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def rewritten(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, message: str) -> str:
    with pytest.raises(InputError, match=message) as error:
        stages.load(str(folder))
    told = str(error.value)
    assert "\n" not in told and len(told) < 400, told
    return told


def test_a_folder_without_neurons_is_refused(
    folder: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    model.save_pretrained(tmp_path / "dense")
    for place in (tmp_path / "dense", tmp_path / "absent", tmp_path / "dense" / "config.json"):
        refused(place, "holds no spiking model")
    shutil.copy(folder / "config.json", tmp_path / "dense")
    refused(tmp_path / "dense", "lacks scale among the parameters of its neurons")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), f"1 tensors are not in its files, the first is {UP};"),
        (lambda t: t.pop(SCALE), "lacks scale among the parameters of its neurons"),
        (lambda t: t.update({SCALE: t[SCALE].bfloat16()}), r"scale is BF16 \[21, 2\] .* says F32"),
        (lambda t: t.update({SCALE: t[SCALE][1:].clone()}), r"is F32 \[20, 2\] .* F32 \[21, 2\]"),
        (lambda t: t.update({"spiking_neurons.d": t[SCALE].clone()}), "also has d among"),
        (
            lambda t: t.update({"more": t[SCALE].clone()}),
            "1 tensors have no place, .* more;",
        ),
        (
            lambda t: t.update({UP: t[UP][1:].clone()}),
            f"1 tensors have another shape, .* {UP};",
        ),
    ],
)
def test_files_hold_every_tensor_and_no_other(
    folder: Path, change: Callable[[Tensors], object], message: str
) -> None:
    rewritten(folder, change)
    refused(folder, message)


def spiking(name: str, value: Any) -> Callable[[Config], object]:
    return lambda config: config["quantization_config"].update({name: value})


def coding(name: str, value: Any) -> Callable[[Config], object]:
    return lambda config: config["quantization_config"]["coding"].update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"]["sites"].pop(), r"\[21, 2\] for 20 different sites"),
        (lambda c: c["quantization_config"].pop("sites"), "cannot be loaded: .* 'sites'"),
        (spiking("sites", None), "cannot be loaded"),
        (spiking("parameters", {"scale": [21, 3]}), r"scale is F32 \[21, 2\] .* F32 \[21, 3\]"),
        (spiking("sites", ["model.norm:out"] * 21), "for 1 different sites"),
        (spiking("sites", [f"s{i}" for i in range(21)]), "neurons at s0, which its model lacks"),
        (spiking("planes", 4), "unknown field 'planes'; load it with the version that wrote it"),
        (
            spiking("transform", {"class": "stages.codings.las.Las"}),
            "as transform .*, which is none",
        ),
        (coding("planes", 4), "Gated what it does not take .*'planes'"),
        (coding("timesteps", 99), "coding.timesteps=99 for gated: give a whole number"),
        (coding("timesteps", "six"), "coding.timesteps='six'"),
        (coding("class", "os.path"), "'os.path', which is none of this version's codings"),
        (coding("class", "subprocess.Popen"), "'subprocess.Popen', which is none"),
        (
            coding("class", "stages.absent.Neurons"),
            "'stages.absent.Neurons', which is none",
        ),
        (coding("class", "stages.absent.Coding"), "'stages.absent.Coding', which is none"),
        (coding("class", 7), "'7', which is none"),
        (
            spiking("coding", {"class": "transform/none@1"}),
            "as coding .*transform/none.*, which is none",
        ),
        (lambda c: c.update(hidden_size="wide"), "cannot be loaded: .*hidden_size.*wide"),
        (lambda c: c.update(hidden_size=64), "21 tensors have another shape"),
        (lambda c: c.update(num_hidden_layers=1), "neurons at model.layers.1"),
        (lambda c: c.update(num_hidden_layers=3), "9 tensors are not in its files"),
        (lambda c: c.update(model_type="none"), "cannot be loaded"),
        (lambda c: c.pop("model_type"), "cannot be loaded"),
    ],
)
def test_a_config_says_what_the_files_hold(
    folder: Path, change: Callable[[Config], object], message: str
) -> None:
    edited(folder, change)
    refused(folder, message)


@pytest.mark.parametrize("text", ["", "{", "[]", '"spiking"', "\ufeff{}"])
def test_a_config_that_is_none_is_one_line(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json is damaged")


@pytest.mark.parametrize("size", [0, 4, 2000, -100])
def test_weights_that_end_early_are_one_line(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, "model.safetensors is damaged")


def test_weights_that_are_not_there_are_one_line(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "cannot be loaded")


def test_transformers_own_loader_refuses_what_does_not_fit_the_neurons(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors.update({SCALE: tensors[SCALE].bfloat16()}))
    with pytest.raises(InputError, match="BF16"):
        AutoModelForCausalLM.from_pretrained(folder)
