"""A stand-in for SANA-FE: neurons on cores, walked event by event, with the calls that are made of it.

It charges the events of Loihi one at a time, with its own constants. `tests/integration/chip.py` runs the
same layers through the real one.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from stages.analysis import chip
from stages.analysis.spiking_layer import SpikingLayer

PJ = {"delivery": 35.5, "message": 111.0, "access": 51.2, "update": 21.6, "hop": 3.0}
SECONDS = {"delivery": 3.8e-9, "access": 6.0e-9}
VERSION = "stand-in"


def random_layer(
    inputs: int, outputs: int, steps: int = 6, tokens: int = 1, rate: float = 2.0, seed: int = 0
) -> SpikingLayer:
    """Values of either sign with `rate` spikes each, and 8-bit weights."""
    generator = torch.Generator().manual_seed(seed)
    fired = torch.rand(tokens, steps, inputs, generator=generator) < rate / steps
    sign = torch.randint(0, 2, (tokens, 1, inputs), generator=generator) * 2 - 1
    weights = torch.randint(-127, 128, (outputs, inputs), generator=generator)
    return SpikingLayer((fired * sign).to(torch.int8), weights.to(torch.int8), 0.01, 0.5)


class Neuron:
    """One neuron before and after it is mapped."""

    def __init__(self, group: str, offset: int, attributes: dict[str, Any]) -> None:
        self.group, self.offset, self.attributes = group, offset, dict(attributes)
        self.unit, self.core, self.targets = "", -1, dict[int, int]()
        self.potential, self.arrived = 0.0, None

    def set_attributes(
        self, soma_hw_name: str = "", model_attributes: Any = None, **_: Any
    ) -> None:
        self.unit = soma_hw_name or self.unit
        self.attributes |= model_attributes or {}

    def map_to_core(self, core: Any) -> None:
        self.core = core.number


class Group(list[Neuron]):
    def connect_neurons_dense(self, others: Group, attributes: dict[str, Sequence[int]]) -> None:
        weights = iter(attributes["w"])
        for neuron in self:
            neuron.targets = {other.offset: next(weights) for other in others}
        assert next(weights, None) is None


class Network:
    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}

    def create_neuron_group(
        self, name: str, size: int, model_attributes: Any = None, log_potential: bool = False
    ) -> Group:
        group = Group(Neuron(name, i, model_attributes or {}) for i in range(size))
        self.groups[name] = group
        return group


class Architecture:
    """`cores` cores, two to a tile, of which each has units for inputs and one for outputs."""

    def __init__(self, file: str) -> None:
        described = yaml.safe_load(Path(file).read_text())["architecture"]
        if described["cores"] < 1:
            raise RuntimeError("no cores\nat all")
        self.described = described

    def cores(self) -> list[Any]:
        return [self._core(number) for number in range(self.described["cores"])]

    def _core(self, number: int) -> Any:
        def unit(name: str, model: str) -> Any:
            return SimpleNamespace(name=name, model_info=SimpleNamespace(name=model))

        units = [unit(f"in[{i}]", "input") for i in range(self.described["max_neurons_supported"])]
        units += [unit("lif", "leaky_integrate_fire"), unit("second", "leaky_integrate_fire")]
        units += [unit("sum", "accumulator"), unit("dense", "current_based")]
        out = SimpleNamespace(metrics=SimpleNamespace(energy_message_out=PJ["message"] * 1e-12))
        into = SimpleNamespace(metrics=SimpleNamespace(energy_message_in=0.0))
        return SimpleNamespace(number=number, pipeline_hw=units, axon_out=[out], axon_in=[into])


class SpikingChip:
    """Input neurons fire as their trains say; what arrives at step t changes a potential at t + 1."""

    doubles = True

    def __init__(self, architecture: Architecture) -> None:
        self.most = architecture.described["max_neurons_supported"]

    def load(self, network: Network) -> None:
        self.mapped_neuron_groups = network.groups
        held: dict[int, list[Neuron]] = defaultdict(list)
        for neuron in self._neurons():
            held[neuron.core].append(neuron)
        assert -1 not in held and max(map(len, held.values())) <= self.most
        emitting = [(n.core, n.unit) for n in self._neurons() if n.group != "outputs"]
        assert len(set(emitting)) == len(emitting), "a unit has one train"
        self.destinations = {neuron.core for neuron in network.groups["outputs"]}

    def _neurons(self) -> Iterator[Neuron]:
        for group in self.mapped_neuron_groups.values():
            yield from group

    def reset(self) -> None:
        for neuron in self._neurons():
            neuron.potential, neuron.arrived = 0.0, None

    def sim(self, steps: int, **traces: Any) -> dict[str, Any]:
        assert traces == {"processing_threads": 1, "potential_trace": True, "perf_trace": True}
        self.energy: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        perf: dict[str, list[Any]] = {"fired": [], "hops": [], "sim_time": []}
        potentials = []
        outputs = self.mapped_neuron_groups["outputs"]
        print(f"Executed steps: [0/{steps}]")
        for step in range(steps):
            before, deliveries = dict(self.counts), self.counts["spikes"]
            for neuron in outputs:
                self._integrate(neuron)
            for neuron in self._neurons():
                train = neuron.attributes.get("spikes", [])
                if step < len(train) and train[step]:
                    self._fire(neuron, outputs)
            potentials.append([neuron.potential for neuron in outputs])
            for name in ("fired", "hops"):
                perf[name].append(self.counts[name] - before.get(name, 0))
            new = self.counts["spikes"] - deliveries
            perf["sim_time"].append(new * SECONDS["delivery"] + len(outputs) * SECONDS["access"])
        parts = ("synapse", "dendrite", "soma", "network")
        return {
            "energy": {name: self.energy[name] * 1e-12 for name in parts},
            "potential_trace": potentials,
            "perf_trace": perf,
            "neurons_fired": self.counts["fired"],
            "neurons_updated": self.counts["updated"],
            "spikes": self.counts["spikes"],
        }

    def _integrate(self, neuron: Neuron) -> None:
        self.energy["soma"] += PJ["access"]
        if neuron.potential or neuron.arrived is not None:
            self.energy["soma"] += PJ["update"]
            self.counts["updated"] += 1
        leak = neuron.attributes["leak_decay"] if self.doubles else 1.0
        neuron.potential = neuron.potential * leak + (neuron.arrived or 0)
        neuron.arrived = None
        assert neuron.potential < neuron.attributes["threshold"]

    def _fire(self, neuron: Neuron, outputs: Group) -> None:
        self.counts["fired"] += 1
        self.counts["updated"] += 1
        for core in self.destinations:
            hops = abs(core // 2 - neuron.core // 2)
            self.counts["hops"] += hops
            self.energy["network"] += PJ["message"] + hops * PJ["hop"]
        for offset, weight in neuron.targets.items():
            outputs[offset].arrived = (outputs[offset].arrived or 0) + weight
            self.energy["synapse"] += PJ["delivery"]
            self.counts["spikes"] += 1


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, **described: int) -> type[SpikingChip]:
    """Put the stand-in where the simulator would be, with a chip in place of Loihi; returns the class of
    its chips."""
    kind = type("Chip", (SpikingChip,), {})
    sanafe, examples = ModuleType("sanafe"), ModuleType("sanafe.examples")
    examples.__file__ = str(folder / "__init__.py")
    given = {"cores": 8, "max_neurons_supported": 40} | described
    (folder / "loihi.yaml").write_text(yaml.safe_dump({"architecture": given}))
    parts = {"load_arch": Architecture, "Network": Network, "SpikingChip": kind}
    for name, value in parts.items():
        monkeypatch.setattr(sanafe, name, value, raising=False)
    monkeypatch.setitem(sys.modules, "sanafe", sanafe)
    monkeypatch.setitem(sys.modules, "sanafe.examples", examples)
    monkeypatch.setattr(chip, "version", lambda name: VERSION)
    return kind
