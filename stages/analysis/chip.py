"""A spiking layer on a simulated neuromorphic chip, and what SANA-FE says of it.

SANA-FE (Boyle et al. 2025, https://doi.org/10.1109/TCAD.2025.3537971) is imported where it is called. A
chip is described by a yaml of its architecture. An input neuron emits the bits of a value, the highest
first; an output neuron is a leaky integrate-and-fire neuron that doubles its potential at every step
(`leak_decay` 2) and never reaches its threshold, so that after T + 1 steps it holds the product of
weights and codes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch import Tensor

from stages.analysis.placement import Placement, Room, place
from stages.analysis.spiking_layer import SpikingLayer
from stages.errors import InputError

PACKAGE = "sanafe==2.2.9"
LOIHI = "loihi"
MOST_NEURONS = 1024  # that a core holds where its description does not say, and its units at most
POTENTIAL_LIMIT = 2**25  # a potential becomes an integer of 32 bits in units of 1/64 at every step
BYTES, BYTES_PER_SYNAPSE = 1.8e9, 700.0  # measured on Loihi, peak
DOUBLING, OUT_OF_REACH = 2.0, 1e30


@dataclass(frozen=True)
class Simulated:
    """What the simulation of a layer gives, over all tokens.

    potentials [tokens, outputs] float64 after the last step; joules by part: synapse, dendrite, soma,
    messages, hops; seconds, messages and hops of each of the T + 1 steps, summed over the tokens.
    """

    potentials: Tensor
    joules: dict[str, float]
    seconds: tuple[float, ...]
    messages: tuple[int, ...]
    hops: tuple[int, ...]
    deliveries: int
    updates: int
    cores: int
    version: str


def check_range(layer: SpikingLayer) -> None:
    """Raise InputError where a potential leaves the range in which the simulator is exact."""
    largest = int(layer.potentials().abs().max())
    if largest >= POTENTIAL_LIMIT:
        raise InputError(
            f"a potential of this layer reaches {largest}, and SANA-FE cuts potentials at "
            f"{POTENTIAL_LIMIT} (32 bits in units of 1/64): take fewer timesteps, or a layer with fewer "
            "inputs"
        )


def check_memory(layer: SpikingLayer, available: int) -> None:
    """Raise InputError where the simulation would take more than the `available` bytes."""
    synapses = layer.inputs * len(layer.signs) * layer.outputs
    needed = BYTES + BYTES_PER_SYNAPSE * synapses
    if needed > available:
        raise InputError(
            f"{synapses} synapses ({layer.inputs} inputs x {len(layer.signs)} signs x {layer.outputs} "
            f"outputs) take about {needed / 1e9:.1f} GB to simulate, {available / 1e9:.1f} GB are "
            "available: choose a smaller layer"
        )


def simulate(layer: SpikingLayer, chip: str) -> Simulated:
    """Run every token of a layer on `chip`, `loihi` or a file; potentials are reset between tokens.

    Raises InputError without SANA-FE, for a chip that it refuses, and for a layer that does not fit.
    """
    sanafe = _simulator()
    check_range(layer)
    check_memory(layer, psutil.virtual_memory().available)
    file = chip_file(chip)
    with _refused(chip):
        most = _most_neurons(file)
        architecture = sanafe.load_arch(str(file))
        rooms = _rooms(architecture, most)
        placement = place(layer.inputs * len(layer.signs), layer.outputs, rooms)
        loaded = sanafe.SpikingChip(architecture)
        loaded.load(_network(sanafe, layer, architecture.cores(), rooms, placement))
        runs = [_run(loaded, layer, token) for token in range(layer.tokens)]
    return _summed(layer, rooms, placement, runs)


def chip_file(chip: str) -> Path:
    """The architecture that `loihi` or the path of a yaml names; raises InputError for anything else."""
    if chip == LOIHI:
        _simulator()
        examples = importlib.import_module("sanafe.examples").__file__
        assert examples is not None
        return Path(examples).with_name("loihi.yaml")
    path = Path(chip).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(
            f"chip={chip}: give {LOIHI}, or the FILE.yaml of an architecture of SANA-FE"
        )
    if not path.is_file():
        raise InputError(f"chip={chip}: there is no such file; give {LOIHI} or a FILE.yaml")
    return path


def _simulator() -> Any:
    try:
        return importlib.import_module("sanafe")
    except ModuleNotFoundError:
        raise InputError(
            f"a chip is simulated by SANA-FE, which is not installed: python -m pip install {PACKAGE}"
        ) from None


@contextmanager
def _refused(chip: str) -> Iterator[None]:
    """Turn what the simulator raises into one line; what its parser writes to stderr beside is dropped."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        except InputError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            why = " ".join(str(error).split())
            raise InputError(
                f"chip={chip}: SANA-FE {version('sanafe')} refuses it: {why}; compare it with the "
                "loihi.yaml of its examples"
            ) from error
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _most_neurons(file: Path) -> int:
    """The least number of neurons that a core of an architecture supports."""
    given: list[int] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            given.extend(int(value[k]) for k in value if k == "max_neurons_supported")
        for each in value.values() if isinstance(value, dict) else value:
            if isinstance(each, dict | list):
                look(each)

    try:
        described = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise InputError(f"chip={file} cannot be read as yaml: {why}") from error
    if not isinstance(described, dict) or "architecture" not in described:
        raise InputError(f"chip={file}: it has no architecture: that describes tiles and cores")
    look(described)
    return min([MOST_NEURONS, *given])


def _rooms(architecture: Any, most: int) -> list[Room]:
    rooms = []
    for core in architecture.cores():
        units: dict[str, list[str]] = {}
        for unit in core.pipeline_hw:
            units.setdefault(unit.model_info.name, []).append(unit.name)
        kinds = ("leaky_integrate_fire", "accumulator", "current_based")
        soma, dendrite, synapse = (units.get(kind, [""])[0] for kind in kinds)
        axons = (
            sum(a.metrics.energy_message_out for a in core.axon_out[:1]) * 1e12,
            sum(a.metrics.energy_message_in for a in core.axon_in[:1]) * 1e12,
        )
        rooms.append(Room(tuple(units.get("input", [])), soma, dendrite, synapse, most, *axons))
    return rooms


def _network(
    sanafe: Any, layer: SpikingLayer, cores: Any, rooms: Sequence[Room], placement: Placement
) -> Any:
    """The layer as groups of neurons, mapped to their cores: one of inputs a sign, one of outputs."""
    network = sanafe.Network()
    silent = {"threshold": OUT_OF_REACH, "leak_decay": DOUBLING}
    outputs = network.create_neuron_group(
        "outputs", layer.outputs, model_attributes=silent, log_potential=True
    )
    for neuron, (core, _) in zip(outputs, placement.outputs, strict=True):
        neuron.set_attributes(
            soma_hw_name=rooms[core].soma,
            dendrite_hw_name=rooms[core].dendrite,
            default_synapse_hw_name=rooms[core].synapse,
        )
        neuron.map_to_core(cores[core])
    for number, sign in enumerate(layer.signs):
        group = network.create_neuron_group(_name(sign), layer.inputs)
        places = placement.inputs[number * layer.inputs : (number + 1) * layer.inputs]
        for neuron, (core, spot) in zip(group, places, strict=True):
            neuron.set_attributes(soma_hw_name=rooms[core].emitters[spot])
            neuron.map_to_core(cores[core])
        weights = (sign * layer.weights.int()).T.flatten()
        group.connect_neurons_dense(outputs, {"w": weights.tolist()})
    return network


def _name(sign: int) -> str:
    return "positive" if sign > 0 else "negative"


def _run(chip: Any, layer: SpikingLayer, token: int) -> dict[str, Any]:
    """What T + 1 steps of one token give."""
    groups = chip.mapped_neuron_groups
    for sign in layer.signs:
        trains = (layer.trains[token] == sign).int().T.tolist()
        for neuron, train in zip(groups[_name(sign)], trains, strict=True):
            # not soma_attributes: SANA-FE 2.2.9 gives those to the dendrite
            neuron.set_attributes(model_attributes={"spikes": train})
    chip.reset()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # its progress
        result: dict[str, Any] = chip.sim(
            layer.steps + 1, processing_threads=1, potential_trace=True, perf_trace=True
        )
    return result


def _summed(
    layer: SpikingLayer,
    rooms: Sequence[Room],
    placement: Placement,
    runs: Sequence[dict[str, Any]],
) -> Simulated:
    def total(name: str) -> float:
        return sum(run["energy"][name] for run in runs)

    def by_step(name: str) -> list[Any]:
        return [sum(step) for step in zip(*(run["perf_trace"][name] for run in runs), strict=True)]

    messages = _message_joules(layer, rooms, placement)
    joules = {name: total(name) for name in ("synapse", "dendrite", "soma")}
    joules |= {"messages": messages, "hops": max(0.0, total("network") - messages)}
    updated = sum(
        run["neurons_updated"] - run["neurons_fired"] for run in runs
    )  # without the inputs
    return Simulated(
        torch.tensor([run["potential_trace"][-1] for run in runs], dtype=torch.float64),
        joules,
        tuple(by_step("sim_time")),
        tuple(n * len(placement.destinations) for n in by_step("fired")),
        tuple(by_step("hops")),
        sum(run["spikes"] for run in runs),
        updated,
        len({core for core, _ in (*placement.inputs, *placement.outputs)}),
        version("sanafe"),
    )


def _message_joules(layer: SpikingLayer, rooms: Sequence[Room], placement: Placement) -> float:
    """What the messages of a layer cost where they leave and where they arrive."""
    spikes = torch.cat([(layer.trains == sign).sum((0, 1)) for sign in layer.signs]).tolist()
    into = sum(rooms[core].reception_pj for core in placement.destinations)
    out = [rooms[core].message_pj * len(placement.destinations) for core, _ in placement.inputs]
    return sum(n * (pj + into) for n, pj in zip(spikes, out, strict=True)) * 1e-12
