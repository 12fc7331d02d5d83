"""Layers on chips that SANA-FE simulates: `python -m pipeline simulate`.

No part of the test suite (its name has no test_). It installs SANA-FE in a temporary folder:

    python -m pytest -s tests/integration/chip.py

Loihi takes about 2 GB of memory. The ordinary suite has the numbers recorded here and a stand-in for the
simulator, `tests/analysis/simulator.py`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import stages
from pipeline.commands import simulate as verb
from pipeline.run import hardware
from stages.analysis.chip import PACKAGE, POTENTIAL_LIMIT, Simulated, chip_file, simulate
from stages.analysis.spiking_layer import SpikingLayer
from stages.errors import InputError
from stages.profiles.loihi import loihi_counts, loihi_energy
from tests.analysis.simulator import random_layer
from tests.analysis.test_chip import RECORDED

# Milliseconds on Loihi of the layers whose energy is recorded.
TIMES = {(576, 576): 2.5673858, (576, 1536): 4.5465154, (1536, 576): 6.7256386}


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sanafe")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), PACKAGE]
    subprocess.run(pip, check=True)
    sys.path.insert(0, str(folder))


def profile(layer: SpikingLayer, neurons_per_core: int = 1024) -> float:
    """Joules by the four counts."""
    shape = (layer.spikes, layer.outputs, layer.steps, layer.tokens)
    counts = loihi_counts(*shape, layer.updates(), neurons_per_core)
    return sum(loihi_energy(counts, hardware.profile("loihi")).values())


def checked(layer: SpikingLayer, chip: str) -> Simulated:
    """The simulation, whose potentials and events are those that the layer has."""
    done = simulate(layer, chip)
    assert torch.equal(done.potentials, layer.sums().double())
    assert done.deliveries == layer.spikes * layer.outputs
    assert done.updates == layer.updates()
    return done


@pytest.mark.parametrize("shape", RECORDED)
def test_recorded_numbers(shape: tuple[int, int]) -> None:
    layer, (spikes, recorded) = random_layer(*shape), RECORDED[shape]
    done = checked(layer, "loihi")
    energy, time = sum(done.joules.values()) * 1e6, sum(done.seconds) * 1e3
    print(f"{shape}: {energy:.6f} uJ, profile {profile(layer) * 1e6:.6f} uJ, {time:.7f} ms")
    assert layer.spikes == spikes
    assert energy == pytest.approx(recorded, rel=1e-6)
    assert profile(layer) * 1e6 == pytest.approx(energy, rel=1e-3)
    assert time == pytest.approx(TIMES[shape], rel=1e-6)


def test_tokens_do_not_see_each_other() -> None:
    layer = random_layer(60, 1100, tokens=5, rate=0.3)
    layer.trains[2] = 0
    layer.trains[3, :3] = 0
    done = checked(layer, "loihi")
    assert sum(done.joules.values()) == pytest.approx(profile(layer), rel=1e-9)
    assert sum(done.messages) == 2 * layer.spikes
    assert done.potentials[2].abs().max() == 0


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., str]:
    """Writes Loihi's description with words replaced."""

    def write(**words: str) -> str:
        text = chip_file("loihi").read_text()
        for old, new in words.items():
            pattern = old.replace("__", "[")
            assert pattern in text
            text = text.replace(pattern, new)
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        return str(file)

    return write


def test_hops_are_what_the_profile_leaves_out(changed: Callable[..., None]) -> None:
    chip = changed(**{"loihi_core__0..3]": "loihi_core[0..0]"})  # every core a tile
    layer = random_layer(600, 1100, tokens=2)
    done = checked(layer, chip)
    rest = sum(done.joules.values()) - profile(layer)
    assert rest == pytest.approx(done.joules["hops"], rel=1e-6)
    assert 3.0e-12 <= rest / sum(done.hops) <= 4.2e-12


def test_smaller_cores_get_more_messages(changed: Callable[..., None]) -> None:
    chip = changed(**{"max_neurons_supported: 1024": "max_neurons_supported: 100"})
    layer = random_layer(30, 250)
    done = checked(layer, chip)
    assert done.cores == 1 + 3 and sum(done.messages) == 3 * layer.spikes
    assert sum(done.joules.values()) == pytest.approx(profile(layer, 100), rel=1e-9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"energy_access_neuron: 51.2e-12": "other: 1"}, "Metric not defined: energy_access"),
        ({"model: leaky_integrate_fire": "model: truenorth"}, "0 of model leaky_integrate_fire"),
        ({"width: 8": "width: x"}, "Could not cast field 'width'"),
    ],
)
def test_what_it_refuses_is_one_line(
    changed: Callable[..., str], capfd, words: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        simulate(random_layer(8, 8), changed(**words))
    captured = capfd.readouterr()
    assert "\n" not in str(refused.value) and not captured.out + captured.err


def test_potentials_are_exact_up_to_the_limit_and_refused_beyond(monkeypatch) -> None:
    trains = torch.ones(1, 18, 10, dtype=torch.int8)
    trains[:, 16:] = 0
    weights = torch.tensor([[12], [-12]], dtype=torch.int8).repeat(1, 10)
    checked(SpikingLayer(trains, weights, 1.0, 1.0), "loihi")
    beyond = SpikingLayer(trains, weights + weights.sign(), 1.0, 1.0)
    with pytest.raises(InputError, match="reaches 34078200, and SANA-FE cuts potentials"):
        simulate(beyond, "loihi")
    monkeypatch.setattr("stages.analysis.chip.check_range", lambda layer: None)
    assert simulate(beyond, "loihi").potentials.tolist() == [[-POTENTIAL_LIMIT, -POTENTIAL_LIMIT]]


def test_the_verb(
    byte_tokenizer: PreTrainedTokenizerFast, tiny_llama: LlamaForCausalLM, tmp_path: Path, capfd
) -> None:
    text = "a spike is sent, and then another one; " * 5
    coding = stages.SignedDigit("signed_digit", 6, 1)
    stages.convert(tiny_llama, text, coding, tokenizer=byte_tokenizer, length=32)
    stages.save(tiny_llama, tmp_path / "spiking", byte_tokenizer)
    site = "model.layers.1.mlp.down_proj:in"
    assert verb.main([str(tmp_path / "spiking"), f"site={site}", f"text={text}"]) == 0
    out = capfd.readouterr().out
    print(out)
    assert "potentials equal the integer sums: 128 of 128 (4 x 32)" in out
    assert "loihi profile: +0.000% with the updates" in out and "SANA-FE 2.2.9" in out
    assert max(map(len, out.splitlines())) <= 120 and "Executed steps" not in out
