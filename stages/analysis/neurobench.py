"""The metrics of NeuroBench, of a spiking or dense language model, from what its evaluation has counted.

Definitions are those of NeuroBench 2.3.0 (github.com/NeuroBench/neurobench; Yik et al. 2025, Nature
Communications 16, 1545), which finds layers and neurons in the modules of a network and looks at what
they are called with. A spiking language model is read as the network that its stepped run is:

- A sample is a window of tokens, a row of the batch.
- A linear layer behind neurons is called once for every plane, the spikes of all its inputs that carry
  one weight: T planes, n T of n ranges, one more where a floor has a spike of its own. All its inputs
  are in {-1, 0, 1}, so what they select are accumulations (ACs); scales of channels belong to the
  weights, means of channels to the bias. Any other linear layer, the head among them where it is not
  converted, is called once with real values, which are multiplied (MACs).
- Mixtures of experts count what tokens meet. NeuroBench would not find fused experts and routers, which
  are no linear modules.
- Products of attention have no weights, and NeuroBench counts none of them: they stand apart, under the
  same names, of the pairs of a query and a key that the mask allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stages.codings.base import site_params
from stages.fitted import Conversion
from stages.model.experts import expert_matrices
from stages.model.families import architecture
from stages.model.offload import offloaded
from stages.model.rules import FUSED
from stages.model.sites import Site, find_sites, fused, rows
from stages.ports.planes import planes

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

VERSION = "2.3.0"
PAIRS = (("q", "k"), ("probs", "v"))  # the operands of each product of attention
ACTIVATIONS = (nn.ReLU, nn.Sigmoid)  # that NeuroBench looks at
# What follows from the counters of an evaluation.
WORKLOAD = (
    "ActivationSparsity",
    "MembraneUpdates",
    "SynapticOperations",
    "attention",
    "planes",
    "overcount",
)
Metrics = dict[str, Any]
_read: WeakKeyDictionary[PreTrainedModel, dict[str, list[Matrix]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Matrix:
    """The weights by which a consumer multiplies a site: how many, how many of them zero, the most zeros
    that one input meets, the inputs of a row, and whether a row meets a part of them, some experts."""

    weights: int
    zeros: int
    column: int
    inputs: int
    routed: bool


def metrics(
    model: PreTrainedModel, counters: pd.DataFrame, samples: int, conversion: Conversion | None
) -> Metrics:
    """Compute the metrics of a model with these neurons, None for the dense one.

    `counters` are those of an evaluation of `samples` windows, one row a site.

    - Footprint: bytes of parameters and buffers, those of the neurons among them.
    - ConnectionSparsity: the part of the weights of linear layers that is zero, not rounded.
    - ActivationSparsity: the part of what all neurons send, a value at every plane, that is no spike; of a
      dense model the part of the outputs of ReLU and sigmoid that is zero, and 0 where it has neither.
    - MembraneUpdates: changes of membrane potentials, one as a value is loaded and one at every spike;
      between spikes nothing leaks. A value that chooses among neurons is loaded into one of them.
    - SynapticOperations: Effective_MACs and Effective_ACs, of which neither input nor weight is zero, and
      Dense, all products of inputs and weights in all calls; biases are in none of them.
    - `planes`: the least and the most calls of a linear layer for one row.

    Operations and updates are those of one sample. Which of the inputs of a layer had a spike is not
    counted: where some of its weights are zero, effective counts are the most there can be, too high by
    `overcount` at most, which is 0 without `zero_weights` and where no input was zero. A code without
    planes in {-1, 0, 1}, a bound or one of increments, has None for what follows from spikes. Integers are
    multiplied: their calls are those of the dense model.
    """
    sites = find_sites(model)
    matrices = _matrices(model, sites)
    every = [matrix for group in matrices.values() for matrix in group]
    zeros = sum(matrix.zeros for matrix in every)
    static = {
        "neurobench": VERSION,
        "samples": samples,
        "Footprint": _footprint(model, conversion),
        "ConnectionSparsity": zeros / sum(matrix.weights for matrix in every),
        "zero_weights": zeros,
    }
    calls: dict[str, int] = {}
    if conversion is not None and conversion.coding.operand_bits is None:
        if not has_planes(conversion):
            return static | dict.fromkeys(WORKLOAD)
        calls = planes_of(conversion)
    table = counters.set_index("site")
    coded = table[table.index.isin(calls)]
    linear = _linear(table, matrices, calls)
    sparsity = _dense_sparsity(model, sites, table) if coded.empty else _sparsity(coded, calls)
    return static | {
        "ActivationSparsity": sparsity,
        "MembraneUpdates": float(coded["values"].sum() + coded["spikes"].sum()) / samples,
        "SynapticOperations": _per_sample(_synops(linear), samples),
        "attention": _per_sample(_attention(table, sites, calls), samples),
        "planes": {"least": int(linear["calls"].min()), "most": int(linear["calls"].max())},
        "overcount": _per_sample(_overcount(linear), samples),
    }


def has_planes(conversion: Conversion) -> bool:
    """Whether the steps of a code are spikes in {-1, 0, 1}."""
    return conversion.coding.neuron and not conversion.coding.tokenwise


def planes_of(conversion: Conversion) -> dict[str, int]:
    """Count the planes of every site of a conversion."""
    neurons, nothing = conversion.neurons, torch.zeros(1, 1)
    numbers = {}
    for index, name in enumerate(neurons.sites):
        coding, params = conversion.coding.at_site(site_params(neurons.fit.params, index))
        coded, _ = planes(coding, nothing, params)
        numbers[name] = sum(len(each.plane) for each in coded.accumulators)
    return numbers


def _linear(
    table: pd.DataFrame, matrices: Mapping[str, Sequence[Matrix]], calls: Mapping[str, int]
) -> pd.DataFrame:
    """The sites that linear layers multiply: whether `coded`, `calls` of a layer for a row, `macs` in one
    of these, `products` with inputs that are not zero in all of them, and how many of those have a zero
    weight, `least` and `most`."""
    table = table[table.index.isin(matrices)]
    coded = table.index.isin(calls)
    number = table.index.map(lambda site: calls.get(site, 1))
    given = table["values"] * number
    entered = table["spikes"].where(coded, table["nonzero"])
    fanout = (table["macs"] / table["values"]).where(table["values"] > 0, 0.0)

    def per_site(count: Callable[[Matrix, float], float]) -> pd.Series:
        sums = {site: sum(count(m, given[site]) for m in matrices[site]) for site in table.index}
        return given.index.to_series().map(sums)

    products = entered * fanout
    column = per_site(lambda matrix, _: matrix.column)
    met = per_site(lambda matrix, inputs: matrix.zeros * (inputs / matrix.inputs))
    surely = per_site(lambda m, inputs: 0 if m.routed else m.zeros * (inputs / m.inputs))
    return table[["macs"]].assign(
        coded=coded,
        calls=number,
        products=products,
        least=(surely - (given - entered) * column).clip(lower=0),
        most=met.clip(upper=entered * column).clip(upper=products),
    )


def _synops(linear: pd.DataFrame) -> dict[str, float]:
    effective, coded = linear["products"] - linear["least"], linear["coded"]
    return {
        "Effective_MACs": effective[~coded].sum(),
        "Effective_ACs": effective[coded].sum(),
        "Dense": (linear["macs"] * linear["calls"]).sum(),
    }


def _overcount(linear: pd.DataFrame) -> dict[str, float]:
    """What zero weights may still add to each of the effective counts."""
    unknown, coded = linear["most"] - linear["least"], linear["coded"]
    return {"Effective_MACs": unknown[~coded].sum(), "Effective_ACs": unknown[coded].sum()}


def _attention(
    table: pd.DataFrame, sites: Iterable[Site], calls: Mapping[str, int]
) -> dict[str, float]:
    """The products of attention: every plane of an operand selects what the other one has become."""
    amounts = dict.fromkeys(("Effective_MACs", "Effective_ACs", "Dense"), 0.0)
    for path in (site.path for site in sites if site.role == "attn.q"):
        for pair in PAIRS:
            operands = [f"{path}:{port}" for port in pair]
            coded = [name for name in operands if name in calls]
            macs, acs = table["macs"], table["acs"]
            if not coded:
                amounts["Effective_MACs"] += macs[operands[0]]
                amounts["Dense"] += macs[operands[0]]
            amounts["Effective_ACs"] += sum(acs[name] for name in coded)
            amounts["Dense"] += sum(macs[name] * calls[name] for name in coded)
    return amounts


def _sparsity(coded: pd.DataFrame, calls: Mapping[str, int]) -> float:
    sent = coded["values"] * coded.index.map(calls)
    return 1 - float(coded["spikes"].sum() / sent.sum())


def _dense_sparsity(model: PreTrainedModel, sites: Iterable[Site], table: pd.DataFrame) -> float:
    """The zeros among the outputs of ReLU and sigmoid, which the next site reads as they are."""
    rules, layers = architecture(model), dict[int, dict[str, list[Site]]]()
    for site in sites:
        layers.setdefault(site.layer, {}).setdefault(site.role, []).append(site)
    read: list[str] = []
    for layer, roles in layers.items():
        outputs = roles.get("mlp.act") or roles.get("mlp.down", [])
        for site in outputs:
            name = rules.activation_of(layer, site.expert is not None)
            if isinstance(model.get_submodule(name), ACTIVATIONS):
                read.append(site.name)
    sums = table.loc[read, ["values", "nonzero"]].sum()
    return 1 - float(sums["nonzero"] / sums["values"]) if read else 0.0


def _per_sample(amounts: Mapping[str, float], samples: int) -> dict[str, float]:
    return {name: float(amount) / samples for name, amount in amounts.items()}


def _footprint(model: PreTrainedModel, conversion: Conversion | None) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    if conversion is not None:
        tensors += conversion.neurons.fit.params.values()
    return sum(tensor.nbytes for tensor in tensors)


def _matrices(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, list[Matrix]]:
    """What multiplies every site of a linear layer; the weights of a model are read once."""
    if model not in _read:
        _read[model] = _read_matrices(model, sites)
    return _read[model]


def _read_matrices(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, list[Matrix]]:
    weights = offloaded(model)
    matrices: dict[str, list[Matrix]] = {}
    for layer in dict.fromkeys(site.layer for site in sites):
        with nullcontext() if weights is None else weights.resident(layer):
            for site in sites:
                if site.layer == layer and site.consumers:
                    matrices[site.name] = [_matrix(weight) for weight in _weights(model, site)]
    return matrices


def _weights(model: PreTrainedModel, site: Site) -> Iterator[Tensor]:
    """The weights [..., outputs, inputs] of every consumer of a site; of an expert's its expert's."""
    for name in site.consumers:
        module: Any = model.get_submodule(name)
        if not fused(module):
            yield rows(module)
        elif site.expert is None:
            yield expert_matrices(module)[0]
        else:
            yield expert_matrices(module)[1][site.expert[1]]


def _matrix(weight: Tensor) -> Matrix:
    zeros = (weight == 0).flatten(0, -2).sum(0)
    return Matrix(
        weight.numel(), int(zeros.sum()), int(zeros.max()), weight.shape[-1], weight.dim() == FUSED
    )
