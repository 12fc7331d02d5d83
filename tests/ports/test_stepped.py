"""Stepped execution: its spikes are all there is, and they give what the fast path gives."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.codings.base import site_params
from stages.codings.free_steps import FreeSteps
from stages.codings.gated import Gated
from stages.codings.gif import Gif
from stages.codings.integer import Integer
from stages.codings.las import Las
from stages.codings.lloyd_max import LloydMax
from stages.codings.multigrain import Multigrain
from stages.codings.oat import Oat
from stages.codings.one_spike import OneSpike
from stages.codings.rate import Rate
from stages.codings.signed_digit import SignedDigit
from stages.codings.timed import Timed
from stages.codings.ttfs import Ttfs
from stages.codings.two_spike import TwoSpike
from stages.errors import InputError
from stages.fitted import Conversion
from stages.model.sites import ROLES, find_sites
from stages.ports.coded import coded
from stages.ports.counters import Counters
from stages.ports.patched import patched
from stages.ports.planes import planes
from tests.codings.test_mixed import mixed
from tests.conftest import FAMILIES
from tests.ports.products import real_products, watched
from tests.transforms.held import compare

CODINGS = [
    Gated("gated", 5, 2, radix=4),
    Gated("gated", 4, 3, offset=True, grain_steps=(0, 1, 2), radix=4),
    Gated("gated", 4, 2, offset=True, radix=16),
    SignedDigit("signed_digit", 5, 2, radix=4),
    SignedDigit("signed_digit", 4, 3, offset=True, radix=8),
    Gated("gated", 4, 2),
    Gated("gated", 4, 3, offset=True, grain_steps=(0, 1, 2)),
    SignedDigit("signed_digit", 5, 2),
    Las("las", 5, "zero"),
    Oat("oat", 5, "half_step", 99.0),
    Multigrain("multigrain", 6, 2, "half_step", False),
    FreeSteps("free_steps", 4, 4, "half_step", False),
    Rate("rate", 5, "zero"),
    TwoSpike("two_spike", 6, "zero", 2),
    OneSpike("one_spike", 8, None),
    Ttfs("ttfs", 16, None, False),
    Timed("timed", 16),
    Timed("timed", 5, 3),
    Timed("timed", 1, 4),
    Timed("timed_free", 12, 2, mu=0.1, levels="free"),
]
# Not about means: W m would be one product with a real operand.
MIXED = replace(mixed(Timed("timed", 6, 2), Gated("gated", 4, 2, radix=4)), centre="none")
ANY = pytest.mark.parametrize("coding", [*CODINGS, MIXED], ids=lambda coding: ids_of(coding))
Draws = Callable[..., Tensor]
Converts = Callable[..., Conversion]


def run(model: PreTrainedModel, conversion: Conversion, ids: Tensor, execution: str) -> Any:
    """Logits and counters of one pass."""
    counters = Counters(find_sites(model), "cpu")
    with torch.no_grad(), patched(model, conversion, counters, execution):
        logits = model(ids, use_cache=False).logits
    return logits, counters.sums[:, :4]


def ids_of(coding: Any) -> str:
    radix = getattr(coding, "radix", 2)
    return f"{coding.name}-{coding.grains}" + f"-radix{radix}" * (radix > 2)


@pytest.mark.parametrize("coding", CODINGS, ids=ids_of)
def test_planes_give_the_values_of_the_fast_path(
    model: PreTrainedModel, convert: Converts, coding: Any
) -> None:
    neurons = convert(model, coding).neurons
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * 2
    x[0, :3] = 0
    for index in range(len(neurons.sites)):
        p = site_params(neurons.fit.params, index)
        found, count = planes(coding, x, p)
        value, spikes = coding.quantise(x, p)
        every = torch.stack([plane for each in found.accumulators for plane in each.plane])
        assert every.dtype == torch.int8 and int(every.abs().max()) <= 1
        assert torch.allclose(found.value(), value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))
        assert torch.equal(count.float(), spikes)
        own, other = coded(found, torch.float32), torch.randn(11, 5)
        assert torch.allclose(own @ other, value @ other, rtol=1e-4, atol=1e-4)
        assert torch.allclose(own @ own.transpose(0, 1), value @ value.t(), rtol=1e-4, atol=1e-3)
        assert torch.allclose(own * own, value * value, rtol=1e-4, atol=1e-4)


@ANY
def test_the_stepped_model_is_the_fast_one_with_the_same_spikes(
    model: PreTrainedModel, tokens: Draws, convert: Converts, coding: Any
) -> None:
    found = compare(model, convert(model, coding), tokens(2, 13))
    assert len(found.far) == len(find_sites(model))
    assert max(found.far.values()) < 1e-5 and found.logits < 1e-5
    assert torch.equal(*found.counters)


@pytest.mark.parametrize("kind", [*FAMILIES])
def test_every_architecture_can_be_stepped(tiny, tokens, convert, kind: str) -> None:
    model = tiny(kind)
    conversion = convert(model, Gated("gated", 5, 2))
    found = compare(model, conversion, tokens(2, 9))
    assert max(found.far.values()) < 1e-5 and found.logits < 1e-5
    assert torch.equal(*found.counters)
    with watched(model) as seen:
        run(model, conversion, tokens(2, 9), "stepped")
    assert not real_products(seen)


@ANY
def test_every_product_has_a_ternary_operand(
    model: PreTrainedModel, tokens: Draws, convert: Converts, coding: Any
) -> None:
    conversion = convert(model, coding)
    with watched(model) as seen:
        run(model, conversion, tokens(2, 9), "stepped")
    assert not real_products(seen)
    modules = {where for where, _, _ in seen.seen}
    linears = {name for site in find_sites(model) for name in site.consumers}
    attention = {site.path for site in find_sites(model) if site.port == "q"}
    assert modules - {"model.rotary_emb"} == linears | attention


def test_the_fast_path_is_caught(model: PreTrainedModel, tokens: Draws, convert: Converts) -> None:
    conversion = convert(model, CODINGS[0])
    with watched(model) as seen:
        run(model, conversion, tokens(2, 9), "fast")
    assert len(real_products(seen)) == 2 * 8 + 1  # seven linear modules and the attention, the head


@pytest.mark.parametrize("role", ["attn.in", "attn.out", "mlp.in", "mlp.down", "head.in"])
def test_a_dense_product_smuggled_in_is_caught(
    model: PreTrainedModel, tokens: Draws, convert: Converts, role: str
) -> None:
    rest = tuple(each for each in ROLES if each != role)
    conversion = convert(model, CODINGS[0], rest)
    with watched(model) as seen:
        run(model, conversion, tokens(2, 9), "stepped")
    consumers = {name for s in find_sites(model) if s.role == role for name in s.consumers}
    assert real_products(seen) == consumers


@pytest.mark.parametrize("roles", [("attn.q", "attn.k"), ("attn.probs", "attn.v")])
def test_attention_without_spikes_is_caught(
    model: PreTrainedModel, tokens: Draws, convert: Converts, roles: tuple[str, ...]
) -> None:
    for left, expected in ((roles, True), (roles[:1], False), (roles[1:], False)):
        conversion = convert(model, CODINGS[0], tuple(r for r in ROLES if r not in left))
        with watched(model) as seen:
            run(model, conversion, tokens(2, 9), "stepped")
        paths = {site.path for site in find_sites(model) if site.port == "q"}
        assert real_products(seen) == (paths if expected else set())


def test_leaving_it_restores_the_model(
    model: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    with torch.no_grad():
        before = model(tokens(2, 9)).logits
        conversion = convert(model, CODINGS[0])
        with (
            pytest.raises(RuntimeError, match="inside"),
            patched(model, conversion, execution="stepped"),
        ):
            raise RuntimeError("inside")
        assert torch.equal(model(tokens(2, 9)).logits, before)


@pytest.mark.parametrize(
    "coding",
    [
        LloydMax("lloyd_max", 3),
        Gif("gif", 3, 16, 0.0, "unary", None),
        Integer(bits=3, per="tensor"),
    ],
    ids=ids_of,
)
def test_codes_that_are_no_ternary_steps_are_refused(
    model: PreTrainedModel, convert: Converts, coding: Any
) -> None:
    conversion = convert(model, coding)
    with (
        pytest.raises(InputError, match="no steps in .-1, 0, 1."),
        patched(model, conversion, execution="stepped"),
    ):
        pass


@pytest.mark.parametrize("use", [torch.relu, lambda x: x + 1, lambda x: x.float() * 2])
def test_what_reads_the_value_of_spikes_is_refused(
    model: PreTrainedModel, convert: Converts, use: Callable[[Tensor], Tensor]
) -> None:
    p = site_params(convert(model, CODINGS[0]).neurons.fit.params, 0)
    value = coded(planes(CODINGS[0], torch.randn(3, 4), p)[0], torch.float32)
    with pytest.raises(InputError, match="no step of a spiking network"):
        use(value)


def test_more_of_the_steps_are_nearer(
    model: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    coding = Gated("gated", 8, 2)
    conversion, ids = convert(model, coding), tokens(2, 13)
    with torch.no_grad():
        dense = model(ids).logits
        errors = []
        for steps in range(1, 9):
            with patched(model, conversion, steps=steps):
                found = model(ids).logits
            errors.append(float((found - dense).square().mean()))
    assert errors[7] < errors[3] < errors[0]
