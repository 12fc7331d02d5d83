"""Spike trains and integer weights of one layer, against what a stepped run decodes and multiplies."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.analysis.spiking_layer import (
    base2_trains,
    consumer_of,
    integer_weights,
    spiking_layer,
)
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.codings.multigrain import Multigrain
from stages.codings.oat import Oat
from stages.codings.rate import Rate
from stages.codings.signed_digit import SignedDigit
from stages.codings.timed import Timed
from stages.errors import InputError
from stages.fitted import Conversion
from stages.model.sites import find_sites
from stages.ports.patched import patched
from stages.ports.planes import planes

Draws = Callable[..., Tensor]
Converts = Callable[..., Conversion]
DOWN = "model.layers.1.mlp.down_proj:in"
BASE2 = [
    Las("las", 6, "zero"),
    Las("las", 5, "half_step"),
    Las("las", 1, "half_step"),
    Gated("gated", 5, 1),
    SignedDigit("signed_digit", 5, 1),
]


def decoded(model: PreTrainedModel, conversion: Conversion, ids: Tensor, consumer: str) -> Any:
    """What enters and leaves a module in a run that multiplies decoded values."""
    seen: list[tuple[Tensor, Tensor]] = []
    module = model.get_submodule(consumer)
    with torch.no_grad(), patched(model, conversion):
        hook = module.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
        model(ids, use_cache=False)
        hook.remove()
    ((x, y),) = seen
    return x.flatten(0, -2), y.flatten(0, -2)


@pytest.mark.parametrize("coding", BASE2, ids=lambda c: f"{c.name}-{c.timesteps}")
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_trains_are_those_of_the_values(
    tiny: Callable[..., PreTrainedModel],
    tokens: Draws,
    convert: Converts,
    coding: Any,
    kind: str,
) -> None:
    model, ids = tiny(kind), tokens(1, 9)
    conversion, sites = convert(model, coding), find_sites(model)
    site = next(s for s in sites if s.role == "mlp.down" and s.layer == 1).name
    consumer, _ = consumer_of(model, sites, site, "")
    layer = spiking_layer(model, conversion, site, consumer, ids)
    x, y = decoded(model, conversion, ids, consumer)
    assert (layer.tokens, layer.steps, layer.inputs) == (9, coding.timesteps, x.shape[1])
    value = layer.codes * layer.unit
    assert torch.allclose(value.float(), x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))
    module: Any = model.get_submodule(consumer)
    bias = 0 if module.bias is None else module.bias.detach()
    moved = float(
        ((layer.sums() * layer.step * layer.unit) - (y - bias)).norm() / (y - bias).norm()
    )
    assert 0 < layer.rounding_error(module.weight) < 0.02
    assert moved == pytest.approx(layer.rounding_error(module.weight), rel=2e-3)
    assert torch.equal(layer.potentials()[:, -1], layer.sums())


def test_a_site_that_several_read_gives_the_one_that_is_named(
    model: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    sites, name = find_sites(model), "model.layers.0.input_layernorm:out"
    attention = "model.layers.0.self_attn"
    projections = [f"{attention}.{p}_proj" for p in "qkv"]
    assert consumer_of(model, sites, name, "") == (projections[0], projections[1:])
    for chosen in ("k_proj", projections[1]):
        assert consumer_of(model, sites, name, chosen)[0] == projections[1]
    conversion = convert(model, Las("las", 4))
    shapes = {
        p: spiking_layer(model, conversion, name, p, tokens(1, 5)).weights.shape
        for p in projections
    }
    assert [*shapes.values()] == [(40, 24), (20, 24), (20, 24)]


def test_a_layer_leaves_the_model_as_it_was(
    model: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    conversion = convert(model, Las("las", 4))
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    spiking_layer(model, conversion, DOWN, "model.layers.1.mlp.down_proj", tokens(1, 5))
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize(
    ("coding", "message"),
    [
        (Gated("gated", 4, 2), "gated has 2 neurons or floors"),
        (SignedDigit("signed_digit", 4, 2), "signed_digit has 2 neurons or floors"),
        (
            Multigrain("multigrain", 4, 2, "half_step", False),
            "multigrain has steps whose weights",
        ),
        (Rate("rate", 4, "zero"), "rate has steps whose weights do not halve"),
        (Timed("timed", 4), "timed has steps whose weights do not halve"),
        (Las("las", 4, granularity="channel"), "las has scales of rows or channels"),
        (Oat("oat", 4, "half_step", 99.0), "oat has 2 neurons or floors"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_codes_are_refused(
    model: PreTrainedModel, tokens: Draws, convert: Converts, coding: Any, message: str
) -> None:
    site, consumer = "model.layers.1.input_layernorm:out", "model.layers.1.self_attn.q_proj"
    with pytest.raises(InputError, match=message):
        spiking_layer(model, convert(model, coding), site, consumer, tokens(1, 5))


def test_means_are_refused() -> None:
    params = {"scale": torch.ones(1), "centre": torch.full((4,), 0.2)}
    found, _ = planes(Las("las", 4, centre="channel"), torch.randn(3, 4), params)
    with pytest.raises(InputError, match="las has scales of rows or channels, or means"):
        base2_trains(found, "las")


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("model.layers.1.mlp.down_poj:in", "", "did you mean model.layers.1.mlp.down_proj:in"),
        ("x", "", "no such site; sites are model.layers.0.input_layernorm:out, "),
        ("model.layers.0.self_attn:q", "", "enters no linear layer of its own; give one"),
        (DOWN, "up_proj", "consumer=up_proj: .* is read by down_proj; choose"),
    ],
)
def test_a_site_without_such_a_layer_is_refused(
    model: PreTrainedModel, name: str, chosen: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        consumer_of(model, find_sites(model), name, chosen)


def test_experts_are_no_layer(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("mixtral")
    sites = find_sites(model)
    name = next(s.name for s in sites if s.expert is not None)
    with pytest.raises(InputError, match="enters no linear layer of its own"):
        consumer_of(model, sites, name, "")


def test_a_site_that_stays_dense_is_refused(
    model: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    conversion = convert(model, Las("las", 4), roles=("attn.in",))
    with pytest.raises(InputError, match="has no neurons in this model"):
        spiking_layer(model, conversion, DOWN, "model.layers.1.mlp.down_proj", tokens(1, 5))


def test_weights_are_rounded_to_the_nearest_and_ties_to_even() -> None:
    weight = nn.Parameter(torch.tensor([[127.0, 0.5, 1.5], [-126.51, -2.5, 0.49]]) / 64)
    rounded, step = integer_weights(weight)
    assert step == pytest.approx(1 / 64) and rounded.dtype == torch.int8
    assert rounded.tolist() == [[127, 0, 2], [-127, -2, 0]]
    assert integer_weights(-weight)[0].tolist() == [[-127, 0, -2], [127, 2, 0]]
    with pytest.raises(InputError, match="matrix of this layer is zero"):
        integer_weights(torch.zeros(2, 2))


def test_a_layer_without_spikes_is_zero(
    model: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    conversion, consumer = convert(model, Las("las", 4)), "model.layers.1.mlp.down_proj"
    layer = spiking_layer(model, conversion, DOWN, consumer, tokens(1, 5))
    silent = replace(layer, trains=torch.zeros_like(layer.trains))
    assert (silent.spikes, silent.updates(), silent.signs) == (0, 0, (1,))
    assert silent.rounding_error(model.get_parameter(f"{consumer}.weight")) == 0
