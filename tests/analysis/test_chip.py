"""Loihi's four counts against what the simulator has given and against events one by one; placement; and
what a layer is to the simulator."""

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from pipeline.run import hardware
from stages.analysis.chip import check_memory, check_range, chip_file, simulate
from stages.analysis.placement import Room, place
from stages.analysis.spiking_layer import SpikingLayer
from stages.errors import InputError
from stages.profiles.base import Counts
from stages.profiles.loihi import loihi_counts, loihi_energy
from tests.analysis.simulator import install, random_layer

# SANA-FE 2.2.9 on `random_layer(inputs, outputs)`, its loihi.yaml: spikes, microjoules.
RECORDED = {
    (576, 576): (1160, 24.129528),
    (576, 1536): (1160, 64.259568),
    (1536, 576): (3046, 62.903802),
}


def joules(layer: SpikingLayer, exact: bool = True, cores: int = 1024) -> float:
    """By the four counts."""
    shape = (layer.spikes, layer.outputs, layer.steps, layer.tokens)
    counts = loihi_counts(*shape, layer.updates() if exact else None, cores)
    return sum(loihi_energy(counts, hardware.profile("loihi")).values())


@pytest.mark.parametrize("shape", RECORDED)
def test_four_counts_are_what_the_simulator_spends(shape: tuple[int, int]) -> None:
    layer, (spikes, recorded) = random_layer(*shape), RECORDED[shape]
    assert layer.spikes == spikes
    assert joules(layer) * 1e6 == pytest.approx(recorded, rel=1e-6)
    assert joules(layer, exact=False) * 1e6 == pytest.approx(recorded, rel=1e-3)


def test_the_counts_of_a_layer_by_hand() -> None:
    counts = loihi_counts(spikes=10, outputs=1025, steps=4, rows=3)
    assert (counts.deliveries, counts.messages) == (
        10250,
        20,
    )  # the last output is alone in its core
    assert (counts.accesses, counts.updates) == (3 * 1025 * 5, 3 * 1025 * 4)
    one = replace(hardware.profile("loihi"), delivery=1, message=0, access=0, update=0)
    assert sum(loihi_energy(counts, one).values()) == pytest.approx(10250e-12)


def test_the_profile_has_the_four_counts_with_the_most_updates() -> None:
    loihi = hardware.profile("loihi")
    layer = random_layer(576, 1536)
    spent = loihi.spent(
        pd.DataFrame(
            [
                {"kind": "linear"}
                | Counts(
                    macs=0,
                    acs=layer.spikes * layer.outputs,
                    dense=0,
                    spikes=layer.spikes,
                    outputs=layer.tokens * layer.outputs,
                    rows=layer.tokens,
                    steps=layer.steps,
                )._asdict()
            ]
        )
    )
    assert spent["J"].sum() == pytest.approx(joules(layer, exact=False), rel=1e-12)


@pytest.mark.parametrize("rate", [0.2, 2.0])
def test_every_event_one_by_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rate: float
) -> None:
    install(monkeypatch, tmp_path)
    layer = random_layer(24, 50, steps=5, tokens=3, rate=rate)
    layer.trains[0, :2] = 0  # a token whose first bits are silent
    layer.weights[7] = 0  # an output that is never anything but zero
    found = simulate(layer, "loihi")
    assert torch.equal(found.potentials, layer.sums().double())
    assert (found.deliveries, found.updates) == (layer.spikes * 50, layer.updates())
    assert layer.updates() < 3 * 50 * 5
    assert len(found.seconds) == len(found.messages) == len(found.hops) == 6
    assert sum(found.messages) == 2 * layer.spikes and found.messages[-1] == 0
    # 48 inputs in cores 0 and 1, 50 outputs in 2 and 3: all one tile further
    assert sum(found.hops) == 2 * layer.spikes and found.cores == 4
    assert found.joules["hops"] == pytest.approx(2 * layer.spikes * 3e-12)
    whole = sum(found.joules.values()) - found.joules["hops"]
    assert whole == pytest.approx(joules(layer, cores=40), rel=1e-9)
    assert found.joules["messages"] == pytest.approx(2 * layer.spikes * 111e-12)


def test_a_neuron_whose_potential_cancels_is_not_updated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path)
    trains = torch.tensor([[[1, 1], [0, 0], [1, 0], [0, 0]]], dtype=torch.int8)
    layer = SpikingLayer(trains, torch.tensor([[3, -3], [3, 2]], dtype=torch.int8), 1.0, 1.0)
    # step 2 finds a potential of 0 at the first output and no spike: one update less of eight
    assert layer.updates() == simulate(layer, "loihi").updates == 7
    assert layer.signs == (1,)
    assert layer.potentials().tolist() == [[[0, 5], [0, 10], [3, 23], [6, 46]]]


ROOM = Room(("a", "b"), "lif", "sum", "dense", most=3)
NONE = Room((), "", "", "", most=3)


def test_cores_are_filled_in_their_order() -> None:
    placed = place(3, 4, [NONE, ROOM, ROOM, NONE, ROOM, ROOM])
    assert placed.inputs == ((1, 0), (1, 1), (2, 0))
    assert placed.outputs == ((4, 0), (4, 1), (4, 2), (5, 0))
    assert placed.destinations == (4, 5)


@pytest.mark.parametrize(
    ("inputs", "outputs", "cores", "message"),
    [
        (5, 1, 2, "room for 4 neurons of model input"),
        (4, 1, 2, "hold inputs, 0 of model"),
        (3, 4, 3, "hold inputs, 3 of model"),
    ],
)
def test_what_does_not_fit_is_refused(inputs: int, outputs: int, cores: int, message: str) -> None:
    with pytest.raises(InputError, match=f"{inputs} inputs .* and {outputs} outputs .*{message}"):
        place(inputs, outputs, [ROOM] * cores)


def test_a_potential_beyond_the_range_is_refused() -> None:
    layer = random_layer(300, 2, steps=12)
    layer.trains[:], layer.weights[:] = 1, 27
    assert int(layer.sums().max()) == 27 * 4095 * 300 < 2**25
    check_range(layer)
    layer.weights[1] = -28  # 28 * 4095 * 300 = 34398000
    with pytest.raises(
        InputError, match="reaches 34398000, and SANA-FE cuts potentials at 33554432"
    ):
        check_range(layer)


def test_a_layer_that_memory_does_not_hold_is_refused() -> None:
    layer = random_layer(100, 200)
    check_memory(layer, int(1.9e9))
    with pytest.raises(InputError, match=r"40000 synapses .* take about 1.8 GB .* 1.0 GB are"):
        check_memory(layer, int(1e9))


def test_without_the_simulator_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sanafe", None)
    for call in (lambda: chip_file("loihi"), lambda: simulate(random_layer(2, 2), "loihi")):
        with pytest.raises(InputError, match="not installed: python -m pip install sanafe==2.2.9"):
            call()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("", "has no architecture:"),
        ("- 1", "has no architecture:"),
        ("architecture: {", "cannot be read as yaml: while parsing"),
        ("architecture: {cores: 0}", "SANA-FE stand-in refuses it: no cores at all; compare"),
        ("architecture: {cores: 1, max_neurons_supported: 9}", "room for 9 neurons"),
        ("architecture: {cores: 4, max_neurons_supported: many}", "refuses it: invalid literal"),
    ],
)
def test_a_chip_that_cannot_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, message: str
) -> None:
    install(monkeypatch, tmp_path)
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        simulate(random_layer(8, 8), str(file))
    assert "\n" not in str(refused.value)


def test_a_chip_of_ones_own_is_a_yaml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path)
    with pytest.raises(InputError, match="chip=truenorth: give loihi, or the FILE.yaml"):
        chip_file("truenorth")
    (tmp_path / "two.yml").write_text("architecture: {cores: 2, max_neurons_supported: 16}")
    assert simulate(random_layer(8, 8), str(tmp_path / "two.yml")).cores == 2
