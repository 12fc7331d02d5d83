"""NeuroBench's metrics against its own counts, those of spikingjelly, and every plane of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import stages
from stages.analysis.neurobench import metrics, planes_of
from stages.codings.gated import Gated
from stages.codings.gif import Gif
from stages.codings.integer import Integer
from stages.codings.las import Las
from stages.codings.lloyd_max import LloydMax
from stages.evaluation import perplexity
from stages.fitted import Conversion
from stages.model.loading import load, load_offloaded
from stages.model.offload import Offload
from stages.model.sites import ROLES
from tests.analysis.layer_calls import ROWS, SAMPLES, Run, potentials, run, run_of
from tests.ports.test_stepped import CODINGS, MIXED, ids_of

Draws = Callable[..., Tensor]
Converts = Callable[..., Conversion]
LAS = Las("las", 4, "zero")


def binary(x: Tensor) -> Tensor:
    return (x != 0).double()


def by_hand(run: Run) -> dict[str, float]:
    """The operations of every call, with both operands reduced to whether they are zero."""
    counts = dict.fromkeys(("Effective_MACs", "Effective_ACs", "Dense"), 0.0)
    for x, weight in run.calls:
        spikes = bool(torch.isin(x, torch.tensor([-1, 0, 1]).to(x)).all())
        effective = float((binary(x) @ binary(weight).t()).sum())
        counts["Effective_ACs" if spikes else "Effective_MACs"] += effective
        counts["Dense"] += x.numel() * weight.shape[0]
    return {name: count / SAMPLES for name, count in counts.items()}


@pytest.mark.parametrize("name", ROWS)
def test_the_counts_of_other_packages(
    model: PreTrainedModel, convert: Converts, tokens: Draws, name: str
) -> None:
    row = ROWS[name]
    run = run_of(row, model, convert, tokens)
    ours = metrics(model, run.counters, SAMPLES, run.conversion)
    assert tuple(ours["SynapticOperations"].values()) == row.neurobench
    kind = "Effective_MACs" if row.coding is None else "Effective_ACs"
    assert ours["SynapticOperations"][kind] == row.spikingjelly
    assert ours["ActivationSparsity"] == pytest.approx(row.sparsity, rel=1e-14)
    assert row.updates in (None, ours["MembraneUpdates"])


@pytest.mark.parametrize("coding", [*CODINGS, MIXED], ids=ids_of)
def test_every_plane_of_every_coding(
    model: PreTrainedModel, convert: Converts, tokens: Draws, coding: Any
) -> None:
    seen = run(model, convert(model, coding), tokens(SAMPLES, 7))
    ours = metrics(model, seen.counters, SAMPLES, seen.conversion)
    assert ours["SynapticOperations"] == by_hand(seen)
    assert ours["zero_weights"] == 0 and not any(ours["overcount"].values())
    if not coding.replaces_softmax:
        sent = torch.cat([planes.flatten() for _, planes, _ in seen.coded])
        sparsity = 1 - float(sent.count_nonzero()) / sent.numel()
        assert ours["ActivationSparsity"] == pytest.approx(sparsity, rel=1e-12)
    assert seen.conversion is not None
    numbers = planes_of(seen.conversion)
    assert {len(planes) for _, planes, _ in seen.coded} <= set(numbers.values())
    spikes, values = seen.counters[["spikes", "values"]].sum()
    assert ours["MembraneUpdates"] == (spikes + values) / SAMPLES


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "opt", "phi3", "gpt_neox"])
@pytest.mark.parametrize("coding", [Gated("gated", 4, 2), None], ids=["gated", "dense"])
def test_experts_and_other_families(
    tiny: Callable[..., PreTrainedModel], convert: Converts, tokens: Draws, kind: str, coding: Any
) -> None:
    model = tiny(kind)
    conversion = None if coding is None else convert(model, coding)
    seen = run(model, conversion, tokens(SAMPLES, 9))
    ours = metrics(model, seen.counters, SAMPLES, conversion)
    assert ours["SynapticOperations"] == pytest.approx(by_hand(seen), rel=1e-12)


def test_a_plane_that_is_left_out_is_noticed(
    model: PreTrainedModel, convert: Converts, tokens: Draws
) -> None:
    seen = run(model, convert(model, LAS), tokens(SAMPLES, 7))
    ours = metrics(model, seen.counters, SAMPLES, seen.conversion)["SynapticOperations"]
    fullest = max(seen.calls, key=lambda call: int(call[0].count_nonzero()))
    fewer = replace(seen, calls=[call for call in seen.calls if call is not fullest])
    assert ours == by_hand(seen) != by_hand(fewer)


def test_attention_stands_apart(model: PreTrainedModel, convert: Converts, tokens: Draws) -> None:
    seen = run(model, convert(model, LAS), tokens(SAMPLES, 7))
    dense = run(model, None, tokens(SAMPLES, 7))
    attention = seen.counters["role"].isin(["attn.q", "attn.k", "attn.v", "attn.probs"])
    pairs = 2 * 7 * 8 / 2 * 4 * 10  # two layers, causal pairs, heads, width
    ours = metrics(model, dense.counters, SAMPLES, None)["attention"]
    assert ours == {"Effective_MACs": 2 * pairs, "Effective_ACs": 0, "Dense": 2 * pairs}
    ours = metrics(model, seen.counters, SAMPLES, seen.conversion)["attention"]
    additions = seen.counters.loc[attention, "acs"].sum() / SAMPLES
    assert ours == {"Effective_MACs": 0, "Effective_ACs": additions, "Dense": 4 * 4 * pairs}
    half = convert(model, LAS, ("attn.k", "attn.out"))
    seen = run(model, half, tokens(SAMPLES, 7))
    ours = metrics(model, seen.counters, SAMPLES, half)["attention"]
    assert (ours["Effective_MACs"], ours["Dense"]) == (pairs, pairs + 4 * pairs)


@pytest.mark.parametrize("share", [1e-3, 0.3])
@pytest.mark.parametrize("coding", [LAS, None], ids=["las", "dense"])
def test_zero_weights_are_counted_and_bound_the_effective_counts(
    model: PreTrainedModel, convert: Converts, tokens: Draws, share: float, coding: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    for weight in layers:
        weight.data[torch.rand(weight.shape, generator=generator) < share] = 0
    zeros = sum(int((weight == 0).sum()) for weight in layers)
    conversion = None if coding is None else convert(model, coding)
    seen = run(model, conversion, tokens(SAMPLES, 7))
    ours, exact = metrics(model, seen.counters, SAMPLES, conversion), by_hand(seen)
    assert ours["zero_weights"] == zeros > 0
    assert ours["ConnectionSparsity"] == zeros / sum(weight.numel() for weight in layers)
    counted = ours["SynapticOperations"]
    assert counted["Dense"] == exact["Dense"]
    kind, other = ("Effective_MACs", "Effective_ACs")[:: 1 if coding is None else -1]
    over = ours["overcount"][kind]
    assert counted[kind] - over <= exact[kind] <= counted[kind]
    assert counted[other] == exact[other] == ours["overcount"][other] == 0
    if coding is None:  # no input is zero
        assert over == 0 and exact[kind] == exact["Dense"] - zeros * 7
    else:
        assert exact[kind] < counted[kind]


def test_zero_weights_of_experts_and_zero_inputs(
    tiny: Callable[..., PreTrainedModel], convert: Converts, tokens: Draws
) -> None:
    """A layer without neurons behind gated products of spikes, many of which are zero."""
    model = tiny("mixtral")
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "embed" not in name:
            weight.data[weight.abs() < 0.01] = 0
    roles = tuple(role for role in ROLES if role != "mlp.down")
    seen = run(model, convert(model, LAS, roles), tokens(SAMPLES, 7))
    ours, exact = metrics(model, seen.counters, SAMPLES, seen.conversion), by_hand(seen)
    assert 0 < exact["Effective_MACs"] < exact["Dense"]
    for kind, over in ours["overcount"].items():
        counted = ours["SynapticOperations"][kind]
        assert counted - over <= exact[kind] < counted


def test_the_footprint_has_the_neurons(
    model: PreTrainedModel, convert: Converts, tokens: Draws
) -> None:
    def size() -> int:
        return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])

    conversion = stages.fit(model, tokens(32, 16), stages.Gated(timesteps=4, grains=2))
    counters = perplexity(model, tokens(1, 7), conversion, 1, "tiny").counters
    dense, spiking = (metrics(model, counters, 1, c)["Footprint"] for c in (None, conversion))
    assert dense == size()
    stages.convert(model, tokens(32, 16), stages.Gated(timesteps=4, grains=2))
    assert spiking == size() > dense


@pytest.mark.parametrize("kind", ["opt", "llama", "mixtral"])
def test_relu_of_a_dense_model(
    tiny: Callable[..., PreTrainedModel], tokens: Draws, kind: str
) -> None:
    model = tiny(kind, **({} if kind == "opt" else {"hidden_act": "relu"}))
    outputs: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _, args, out: outputs.append(out.flatten()))
    counters = perplexity(model, tokens(SAMPLES, 9), None, 2, "tiny").counters
    sent = torch.cat(outputs)
    ours = metrics(model, counters, SAMPLES, None)
    assert 0.2 < ours["ActivationSparsity"] == 1 - float(sent.count_nonzero()) / sent.numel()
    assert ours["MembraneUpdates"] == 0


def test_membranes_by_their_equations(
    model: PreTrainedModel, convert: Converts, tokens: Draws
) -> None:
    """All potentials before the first step, and afterwards those that differ from the step before."""
    seen = run(model, convert(model, LAS), tokens(SAMPLES, 7))
    updates = sum(
        levels[0].numel()
        + sum(int((a != b).sum()) for a, b in zip(levels, levels[1:], strict=False))
        for levels in potentials(seen, LAS.timesteps)
    )
    ours = metrics(model, seen.counters, SAMPLES, seen.conversion)
    assert ours["MembraneUpdates"] == updates / SAMPLES


@pytest.mark.parametrize(
    "coding", [LloydMax("lloyd_max", 3), Gif("gif", 3, 16, 0.0, "unary", None)], ids=ids_of
)
def test_codes_without_planes_are_undefined(
    model: PreTrainedModel, convert: Converts, tokens: Draws, coding: Any
) -> None:
    conversion = convert(model, coding)
    counters = perplexity(model, tokens(SAMPLES, 7), conversion, 2, "tiny").counters
    ours, dense = metrics(model, counters, SAMPLES, conversion), metrics(model, counters, 2, None)
    undefined = {name for name, value in ours.items() if value is None}
    assert undefined == {"ActivationSparsity", "MembraneUpdates", "SynapticOperations"} | {
        "attention",
        "planes",
        "overcount",
    }
    assert ours["ConnectionSparsity"] == dense["ConnectionSparsity"]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_layers_on_disk_have_the_weights_of_those_in_memory(
    tiny: Callable[..., PreTrainedModel],
    tokens: Draws,
    byte_tokenizer: Any,
    tmp_path: Any,
    kind: str,
) -> None:
    made = tiny(kind)
    for weight in made.parameters():
        weight.data[weight.abs() < 0.02] = 0
    made.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    where: dict[str, Any] = {"device": "cpu", "revision": None, "dtype": "float32"}
    whole, _ = load(str(tmp_path), device_map=None, **where)
    lazy, _ = load_offloaded(str(tmp_path), offload=Offload("memory"), **where)
    counters = perplexity(whole, tokens(SAMPLES, 7), None, 2, "tiny").counters
    ours, theirs = (metrics(each, counters, SAMPLES, None) for each in (lazy, whole))
    assert ours == theirs and ours["zero_weights"] > 0


def test_integers_are_multiplied_where_they_are_not_zero(
    model: PreTrainedModel, convert: Converts, tokens: Draws
) -> None:
    conversion = convert(model, Integer(bits=3))
    frame = perplexity(model, tokens(SAMPLES, 7), conversion, 2, "tiny").counters
    ours = metrics(model, frame, SAMPLES, conversion)
    plain = perplexity(model, tokens(SAMPLES, 7), None, 2, "tiny").counters
    dense = metrics(model, plain, SAMPLES, None)
    assert ours["zero_weights"] == 0 and ours["planes"] == {"least": 1, "most": 1}
    linear = frame[~frame["role"].isin(("attn.q", "attn.k", "attn.v", "attn.probs"))]
    entered = (linear["nonzero"] * linear["macs"] / linear["values"]).fillna(0).sum() / SAMPLES
    amounts = ours["SynapticOperations"]
    assert amounts["Effective_MACs"] == pytest.approx(entered, rel=1e-12)
    assert amounts["Effective_MACs"] < dense["SynapticOperations"]["Effective_MACs"]
    assert amounts["Effective_ACs"] == 0
    assert amounts["Dense"] == dense["SynapticOperations"]["Dense"]
