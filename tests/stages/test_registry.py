"""Codings, transforms and statistics are known by names that outlive their files."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import stages
from stages import registry
from stages.codings.gated import Gated
from stages.codings.signed_digit import SignedDigit
from stages.errors import InputError
from stages.fits.sensitivity import Sensitivity
from stages.registry import identity, lookup, register, registered
from stages.transforms.search import PrefixSearch
from stages.transforms.transform import RotatePrefix

ROOT = Path(__file__).parents[2]
EXPORTED = ROOT / "tests/data/exported"  # by a version that wrote the paths of classes
# The classes that such exports may name, and what they are called now.
PATHS = {
    **{
        f"stages.codings.{module}.{name}": f"coding/{module}@1"
        for module, name in {
            "compander": "Compander",
            "free_steps": "FreeSteps",
            "gated": "Gated",
            "gif": "Gif",
            "las": "Las",
            "lloyd_max": "LloydMax",
            "multigrain": "Multigrain",
            "oat": "Oat",
            "one_spike": "OneSpike",
            "phase": "Phase",
            "rate": "Rate",
            "signed_digit": "SignedDigit",
            "ttfs": "Ttfs",
            "two_spike": "TwoSpike",
        }.items()
    },
    "stages.llm.transforms.Untouched": "transform/none@1",
    "stages.llm.transforms.Fuse": "transform/fuse@1",
    "stages.llm.transforms.Rotate": "transform/rotate@1",
    "stages.llm.transforms.RotatePrefix": "transform/rotate_prefix@1",
    "stages.llm.prefix.PrefixSearch": "search/prefix@1",
    "stages.llm.sensitivity.Sensitivity": "statistic/sensitivity@2",
    "stages.llm.smoothing.Smoothing": "statistic/smoothing@1",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_of_an_earlier_export_is_the_class_of_its_name(path: str) -> None:
    assert identity(lookup(path)) == PATHS[path]
    assert lookup(PATHS[path]) is lookup(path)


@pytest.mark.parametrize(
    ("name", "coding", "transform"),
    [
        (
            "gated",
            Gated(
                "gated_budget",
                4,
                2,
                offset=True,
                sensitivity=Sensitivity(windows=2),
                allocation="budget",
            ),
            {"class": "stages.llm.transforms.Untouched", "name": "none"},
        ),
        (
            "signed_digit",
            SignedDigit("signed_digit", 5, 2),
            RotatePrefix("rotate_prefix", 0, PrefixSearch(64.0)),
        ),
    ],
)
def test_a_folder_of_an_earlier_version_loads_with_the_same_neurons(
    name: str, coding: Any, transform: Any, tmp_path: Path
) -> None:
    folder, recorded = EXPORTED / name, load_file(EXPORTED / f"{name}.safetensors")
    assert "stages." in (folder / "config.json").read_text()
    model = stages.load(folder)
    conversion = stages.conversion(model)
    assert conversion.coding == coding
    stored = load_file(folder / "model.safetensors")
    for parameter, value in conversion.neurons.fit.params.items():
        assert torch.equal(value, stored[f"spiking_neurons.{parameter}"]), parameter
    with torch.inference_mode():
        logits = model(recorded["ids"]).logits
    # to the bit on the machine that wrote it; another one rounds its sums otherwise
    torch.testing.assert_close(logits, recorded["logits"], atol=1e-4, rtol=1e-4)
    again = tmp_path / "again"
    stages.save(model, again)
    with torch.inference_mode():
        assert torch.equal(stages.load(again)(recorded["ids"]).logits, logits)


def test_what_is_exported_names_no_file(tmp_path: Path) -> None:
    stages.save(stages.load(EXPORTED / "signed_digit"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["coding"]["class"] == "coding/signed_digit@1"


def test_another_version_of_a_class_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EXPORTED / "gated", folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace("stages.codings.gated.Gated", "coding/gated@2")
    )
    with pytest.raises(InputError, match="coding/gated@2, and this version reads coding/gated@1"):
        stages.load(folder)


def test_an_earlier_version_of_what_was_only_fitted_with_is_read() -> None:
    assert lookup("statistic/sensitivity@1") is lookup("statistic/sensitivity@2") is Sensitivity
    for version in (0, 3):
        with pytest.raises(InputError, match="this version reads statistic/sensitivity@2"):
            lookup(f"statistic/sensitivity@{version}")


def test_a_name_stands_for_one_class() -> None:
    class Other:
        pass

    with pytest.raises(ValueError, match="coding/gated is the name of Gated already"):
        register("coding/gated", was="nowhere.Other")(Other)
    assert lookup("coding/gated@1") is Gated


def test_a_subclass_is_not_called_as_its_base() -> None:
    class Mine(Gated):
        pass

    assert identity(Mine) is None
    assert identity(SignedDigit) == "coding/signed_digit@1"


@pytest.mark.parametrize(
    "file",
    sorted((ROOT / "conf").glob("coding/*.yaml")) + sorted((ROOT / "conf").glob("transform/*")),
)
def test_every_choice_of_the_configuration_is_registered(file: Path) -> None:
    module, _, name = OmegaConf.load(file)._target_.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    assert (identity(kind) or "").startswith(f"{file.parent.name}/")
    assert registered(file.parent.name)[name] is kind


def test_names_are_found_before_any_module_of_theirs_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scanned: list[str] = []
    importing: Callable[..., Any] = registry._import_all
    monkeypatch.setattr(registry, "_import_all", lambda: (scanned.append("all"), importing()))
    with pytest.raises(InputError, match="'coding/none_such@1', which is none"):
        lookup("coding/none_such@1")
    assert scanned == ["all"]
