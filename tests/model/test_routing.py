"""Routed experts: converted by token, costed by routing, refused or left dense where none came."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.analysis.operations import operations
from stages.capture import Capture
from stages.codings.gated import Gated
from stages.distribution import Distribution
from stages.energy import Energy, account
from stages.errors import InputError
from stages.evaluation import perplexity
from stages.fitted import Conversion
from stages.fitting import Fitting
from stages.model.sites import ROLES, find_sites
from stages.ports.counters import Counters
from stages.ports.patched import patched
from stages.sketch import SketchSet
from tests.conftest import TINY

GATED = Gated("gated", 6, 2)
Converts = Callable[..., Conversion]
Draws = Callable[..., Tensor]


def test_experts_left_dense_are_another_model(
    tiny: Callable[..., PreTrainedModel], tokens: Draws, convert: Converts
) -> None:
    """What hooks on linear modules alone would convert misses all experts."""
    model = tiny("mixtral")
    coding = Gated("gated", 3, 1)
    conversion = convert(model, coding)
    outside = tuple(role for role in ROLES if role not in ("mlp.act", "mlp.up", "mlp.down"))
    with torch.no_grad():
        with patched(model, conversion):
            whole = model(tokens(1, 9)).logits
        with patched(model, convert(model, coding, outside)):
            assert not torch.allclose(model(tokens(1, 9)).logits, whole, atol=1e-2)


def test_an_experts_counters_are_those_of_the_tokens_routed_to_it(
    tiny: Callable[..., PreTrainedModel], tokens: Draws, convert: Converts
) -> None:
    model, ids = tiny("mixtral"), tokens(2, 9)
    routed: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, args, out: routed.append(out[2]))
        for layer in model.model.layers
    ]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    conversion = convert(model, GATED)
    routed.clear()
    counters = Counters(find_sites(model), "cpu")
    with torch.no_grad(), patched(model, conversion, counters):
        model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    frame = counters.frame(set(conversion.neurons.sites)).set_index("site")
    for layer, chosen in enumerate(routed):
        real = chosen[mask.flatten().bool()]
        for expert in range(4):
            tokens_there = int((real == expert).sum())
            name = f"model.layers.{layer}.mlp.experts:down[{expert}]"
            assert frame.loc[name, "values"] == tokens_there * TINY["intermediate_size"]
            assert frame.loc[name, "macs"] == frame.loc[name, "values"] * TINY["hidden_size"]
            assert frame.loc[name, "acs"] == frame.loc[name, "spikes"] * TINY["hidden_size"]
    inner = "model.layers.0.post_attention_layernorm:out"
    fanout = 4 + 2 * 2 * TINY["intermediate_size"]  # the router, and gate and up of two experts
    assert frame.loc[inner, "macs"] == frame.loc[inner, "values"] * fanout


@pytest.fixture
def lonely(tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A model whose expert 3 of layer 1 no token is routed to."""
    model = tiny("mixtral")
    router = model.model.layers[1].mlp.gate
    norm = model.model.layers[1].post_attention_layernorm
    with torch.no_grad():
        norm.weight.abs_()
        router.weight[3] = 0
        router.weight[:3] = torch.randn(3, 24) * 50
    routed = router.forward

    def elsewhere(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = routed(hidden)
        return logits, weights, torch.where(index == 3, 2, index)

    router.forward = elsewhere
    return model


def test_an_expert_that_calibration_never_reached_is_an_error(
    lonely: PreTrainedModel, tokens: Draws
) -> None:
    with pytest.raises(
        InputError, match=r"1 experts were reached .*1.mlp.experts\[3\].*unreached=dense"
    ):
        Capture().run(lonely, tokens(2, 9), find_sites(lonely), 2)


def test_or_stays_dense_and_costs_multiplications(
    lonely: PreTrainedModel, tokens: Draws, energy: Energy, tmp_path: Path
) -> None:
    sites = find_sites(lonely)
    sketches = Capture(unreached="dense").run(lonely, tokens(4, 9), sites, 2)
    assert len(sketches.sites) == len(sites) - 3
    lost = tuple(f"model.layers.1.mlp.experts:{port}[3]" for port in ("act", "up", "down"))
    assert sketches.unreached == lost
    sketches.save(tmp_path)
    assert SketchSet.load(tmp_path).unreached == lost
    densities = Distribution(atoms=64).run(sketches)
    conversion = Conversion(GATED, Fitting("atoms", 1, 0).run(densities, GATED))
    del lonely.model.layers[1].mlp.gate.forward  # now tokens come there
    found = perplexity(lonely, tokens(3, 16, seed=2), conversion, 2, "text")
    counters = found.counters.set_index("site")
    down = [f"model.layers.1.mlp.experts:down[{expert}]" for expert in range(4)]
    assert counters.loc[down[3], "macs"] > 0 and counters.loc[down[3:], "spikes"].isna().all()
    cost = account(operations(lonely, sites), energy, 16, found.counters, GATED)
    rows = cost[(cost["convention"] == "causal") & (cost["phase"] == "prefill")].set_index("op")
    row = rows.loc["model.layers.1.mlp.experts:down"]
    row = row[row["kind"] == "linear"].iloc[0]
    assert row["macs"] == pytest.approx(counters.loc[down[3], "macs"] / 3)
    assert row["acs"] == pytest.approx(counters.loc[down[:3], "acs"].sum() / 3)


def test_experts_of_another_layout_are_refused(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("mixtral")
    model.model.layers[0].mlp.experts.has_gate = False
    with pytest.raises(InputError, match="another layout .has_gate."):
        find_sites(model)


def test_a_gate_that_is_not_known_is_refused(
    tiny: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("mixtral")

    def _apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        return gate_up.chunk(2, -1)[1]

    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "_apply_gate", _apply_gate)
    with pytest.raises(InputError, match="another layout .a gate of its own."):
        find_sites(model)
