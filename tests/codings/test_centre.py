"""Values coded about the means of their channels: where they enter, and what it is used with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import stages
from stages.capture import Capture
from stages.codings.base import Scaled, site_params
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.codings.multigrain import Multigrain
from stages.codings.oat import Oat
from stages.codings.rate import Rate
from stages.codings.signed_digit import SignedDigit
from stages.distribution import Distribution
from stages.errors import InputError
from stages.fits import centring
from stages.fits.algorithm1 import Algorithm1
from stages.fits.sensitivity import Sensitivity
from stages.fits.statistics import CENTRED, ChannelMean
from stages.fitting import Fitting
from stages.model.sites import find_sites
from stages.neurons.spikes import Params
from stages.ports.attention import Port
from stages.ports.coded import coded
from stages.ports.hooks import attached
from stages.ports.patched import patched
from stages.ports.planes import planes
from stages.ports.port import SpikingPort
from tests.codings.values import averages
from tests.conftest import FAMILIES
from tests.ports.products import watched
from tests.transforms.held import compare

CHANNEL: dict[str, Any] = {"centre": "channel"}
QUICK = Algorithm1(rounds=1, neuron_steps=3, base_steps=3)
CODINGS: list[Scaled] = [
    Rate("rate", 8, levels=5, quantile=0.9, **CHANNEL),
    Las("las_rounded", 5, "half_step", **CHANNEL),
    Las("las_rounded", 5, "half_step", granularity="channel", **CHANNEL),
    Oat("oat", 4, "half_step", 95.0, **CHANNEL),
    Multigrain("multigrain", 5, 2, algorithm1=QUICK, **CHANNEL),
    Gated("gated", 4, 2, **CHANNEL),
    Gated("gated", 4, 3, offset=True, sensitivity=Sensitivity(windows=2), **CHANNEL),
    SignedDigit("signed_digit", 4, 2, **CHANNEL),
]
every_coding = pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.name}-{c.granularity}")
Draws = Callable[..., Tensor]


@pytest.fixture
def ids(tokens: Draws) -> Tensor:
    return tokens(4, 16, seed=1)


# --- codes that show where the means go ------------------------------------------------------------


@dataclass(frozen=True)
class Whole(Las):
    """Codes nothing: a value passes as it is."""

    name: str = "whole"

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        return x.float(), torch.zeros_like(x, dtype=torch.float32)


@dataclass(frozen=True)
class Silent(Las):
    """Sends no spike at all."""

    name: str = "silent"

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(x, dtype=torch.float32)


@contextmanager
def coded_by(
    model: PreTrainedModel, codes: dict[str, Scaled], means: dict[str, Tensor]
) -> Iterator[None]:
    """The model with codes by role about means by site, the other roles dense."""
    sites = find_sites(model)
    ports: dict[str, Port] = {}
    for site in sites:
        if site.role in codes:
            centre = {"centre": means[site.name]} if site.name in means else {}
            ports[site.name] = SpikingPort(codes[site.role], {"scale": torch.ones(1), **centre})
    with torch.no_grad(), attached(model, sites, ports):
        yield


@pytest.mark.parametrize("kind", [*FAMILIES])
def test_a_code_without_error_leaves_the_dense_model(
    tiny: Callable[..., PreTrainedModel], ids: Tensor, tokens: Draws, kind: str
) -> None:
    model, other = tiny(kind), tokens(2, 13)
    with torch.no_grad():
        dense = model(other).logits
    with coded_by(model, dict.fromkeys(CENTRED, Whole()), averages(model, ids)):
        found = model(other).logits
    assert float((found - dense).norm() / dense.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "opt", "phi3", "gpt_neox"])
def test_a_silent_input_of_a_linear_layer_gives_its_product_with_the_means(
    tiny: Callable[..., PreTrainedModel], ids: Tensor, kind: str
) -> None:
    model, given = tiny(kind), {}
    means = averages(model, ids)
    sites = [s for s in find_sites(model) if s.consumers and s.role in CENTRED and s.layer == 1]
    modules = dict(model.named_modules())
    consumers = {name: site for site in sites for name in site.consumers}
    for name in consumers:

        def note(module: Any, args: Any, output: Tensor, name: str = name) -> None:
            given[name] = output

        modules[name].register_forward_hook(note)
    silent: dict[str, Scaled] = {site.role: Silent() for site in sites}
    with coded_by(model, silent, means):
        model(ids, use_cache=False)
    for name, site in consumers.items():
        module: Any = modules[name]
        expected = module.weight.detach() @ means[site.name]
        expected = expected if module.bias is None else expected + module.bias.detach()
        found = given[name].reshape(-1, len(expected))
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probs", [Whole(), Las("las", 2), Silent()], ids=lambda c: c.name)
def test_attention_gives_the_mean_of_silent_values_whatever_its_probabilities(
    model: PreTrainedModel, ids: Tensor, probs: Scaled
) -> None:
    """Floored probabilities sum to less than one, and the mean is added once all the same."""
    means, given = averages(model, ids), {}
    out = next(s for s in find_sites(model) if s.role == "attn.out" and s.layer == 1)
    value = next(s for s in find_sites(model) if s.role == "attn.v" and s.layer == 1)
    module = model.get_submodule(out.path)
    module.register_forward_pre_hook(lambda _, args: given.setdefault("x", args[0]))
    with coded_by(model, {"attn.v": Silent(), "attn.probs": probs}, means):
        model(ids, use_cache=False)
    grouped = means[value.name].view(2, 1, 10).expand(2, 2, 10).flatten()  # two heads read each
    torch.testing.assert_close(given["x"], grouped.expand_as(given["x"]), rtol=1e-5, atol=1e-6)


def test_the_mean_of_silent_keys_is_invisible(model: PreTrainedModel, ids: Tensor) -> None:
    """All keys being the same, a query attends to all that it sees alike; as if the keys were zero."""
    means = averages(model, ids)
    with coded_by(model, {"attn.k": Silent()}, means):
        about = model(ids, use_cache=False).logits
    with coded_by(model, {"attn.k": Silent()}, {}):
        zero = model(ids, use_cache=False).logits
    assert float((about - zero).norm() / zero.norm()) < 1e-6


# --- use -------------------------------------------------------------------------------------------


@every_coding
def test_the_stepped_model_is_the_fast_one_with_the_same_spikes(
    model: PreTrainedModel, ids: Tensor, tokens: Draws, coding: Scaled
) -> None:
    found = compare(model, stages.fit(model, ids, coding), tokens(2, 13))
    assert len(found.far) == len(find_sites(model))
    assert max(found.far.values()) < 1e-5 and found.logits < 1e-5
    assert torch.equal(*found.counters)


@pytest.mark.parametrize("kind", ["llama", "opt", "phi3", "gemma3_text", "mixtral"])
def test_every_product_has_a_ternary_operand_but_those_that_are_biases(
    tiny: Callable[..., PreTrainedModel], ids: Tensor, tokens: Draws, kind: str
) -> None:
    model = tiny(kind)
    conversion = stages.fit(model, ids, Gated("gated", 4, 2, **CHANNEL))
    found = compare(model, conversion, tokens(2, 13))
    assert max(found.far.values()) < 1e-5 and found.logits < 1e-5
    with (
        watched(model) as products,
        torch.no_grad(),
        patched(model, conversion, execution="stepped"),
    ):
        model(tokens(2, 9), use_cache=False)
    real = [(w, name) for w, name, ternary in products.seen if not ternary and "rotary" not in w]
    centred = [s for s in find_sites(model) if s.role in centring.SAFE and s.consumers]
    biases = {name for site in centred if site.expert is None for name in site.consumers}
    assert {where for where, _ in real} == biases
    assert {name for _, name in real} == {"mv"}  # of one row: the means


@pytest.mark.parametrize("execution", ["fast", "stepped"])
def test_pads_and_a_cache_change_nothing(
    model: PreTrainedModel, ids: Tensor, tokens: Draws, execution: str
) -> None:
    conversion = stages.fit(model, ids, Gated("gated", 12, 4, **CHANNEL))
    text = tokens(1, 11, seed=3)
    padded = torch.cat([torch.full((1, 4), 49), text], 1)
    mask = (torch.arange(15)[None] >= 4).long()
    with torch.no_grad(), patched(model, conversion, execution=execution):
        whole = model(text, use_cache=False).logits
        beside = model(padded, attention_mask=mask, use_cache=False).logits[:, 4:]
        cache = model(text[:, :6], use_cache=True).past_key_values
        later = model(text[:, 6:], cache=cache).logits
    assert float((beside - whole).norm() / whole.norm()) < 2e-3
    assert float((later - whole[:, 6:]).norm() / whole.norm()) < 2e-3


def test_a_folder_keeps_the_means(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        dense = model(ids).logits
        stages.convert(model, ids, CODINGS[5])
        logits = model(ids).logits
        stages.save(model, tmp_path / "saved")
        again = stages.load(tmp_path / "saved")
        assert torch.equal(again(ids).logits, logits)
        assert torch.equal(stages.restore(model)(ids).logits, dense)
    assert stages.conversion(again).coding == CODINGS[5]
    assert bool(stages.conversion(again).neurons.fit.params["centre"].any())


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Las("las", 6, centre="token"), "centre='token'.*none or channel"),
        (lambda: Multigrain(tau="running_maximum", **CHANNEL), "tau=running_maximum"),
        (lambda: ChannelMean(("attn.q",)), "attn.q.*attn.in"),
    ],
)
def test_what_does_not_go_together_is_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()


def test_samples_are_refused(model: PreTrainedModel, ids: Tensor) -> None:
    sites = find_sites(model)
    densities = Distribution(atoms=64).run(Capture().run(model, ids, sites, 2))
    with pytest.raises(InputError, match="fitting.data=samples.*centre=none"):
        Fitting("samples", 100).run(densities, Multigrain(algorithm1=QUICK, **CHANNEL))


def test_stepped_values_about_means_enter_linear_layers_alone(
    model: PreTrainedModel, ids: Tensor
) -> None:
    neurons = stages.fit(model, ids, CODINGS[1]).neurons
    p = site_params(neurons.fit.params, neurons.roles.index("mlp.in"))
    value = coded(planes(CODINGS[1], torch.randn(2, 3, 24), p)[0], torch.float32)
    with pytest.raises(InputError, match="linear layers.*coding.centre=none"):
        value @ torch.randn(24, 2)
