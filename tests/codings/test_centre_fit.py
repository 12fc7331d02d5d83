"""Values coded about the means of their channels: how those are measured, and fitted with."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import stages
from stages.atoms import Atoms
from stages.capture import Capture
from stages.codings.base import Scaled, error_and_spikes
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.distribution import Distribution
from stages.fits import centring
from stages.fits.sensitivity import CELLS, CentredSensitivity, Sensitivity, cell, predicted_loss
from stages.fits.statistics import CENTRED, ChannelMean, ChannelScale
from stages.model.sites import Site, find_sites
from stages.patching import Patching
from stages.statistics import measuring
from tests.codings.test_centre import CHANNEL, CODINGS, every_coding
from tests.codings.values import averages, seen

Draws = Callable[..., Tensor]


@pytest.fixture
def ids(tokens: Draws) -> Tensor:
    return tokens(4, 16, seed=1)


# --- the statistic ---------------------------------------------------------------------------------


SCALED = [(kind, scale) for kind in ("llama", "opt", "phi3") for scale in (None, ChannelScale(0.9))]


@pytest.mark.parametrize(("kind", "scale"), [*SCALED, ("mixtral", None)])  # experts have no scales
def test_the_means_are_those_of_the_values(
    tiny: Callable[..., PreTrainedModel], ids: Tensor, kind: str, scale: ChannelScale | None
) -> None:
    model = tiny(kind)
    sites = find_sites(model)
    values = seen(model, ids, sites)
    found = measuring(ChannelMean(scale=scale))(model, ids, sites, 2)
    for index, site in enumerate(sites):
        row = found["mean"][index]
        if site.role not in CENTRED or site.expert is not None:
            assert not bool(row.any())
            continue
        expected = values[site.name].double().mean(0).float()
        torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-5, atol=1e-6)
        assert not bool(row[len(expected) :].any())


def seen_atoms(model: PreTrainedModel, ids: Tensor, coding: Scaled) -> tuple[list[Site], Atoms]:
    sites = find_sites(model)
    sketches = Capture().run(model, ids, sites, 2)
    atoms = Distribution(atoms=64).run(sketches).atoms
    statistics = {s.name: measuring(s)(model, ids, sites, 2) for s in coding.statistics}
    return sites, coding.seen(replace(atoms, statistics=statistics))


@pytest.mark.parametrize("granularity", ["site", "channel"])
def test_the_atoms_are_those_about_the_means(
    model: PreTrainedModel, ids: Tensor, granularity: str
) -> None:
    coding = Las("las", 6, granularity=granularity, **CHANNEL)
    sites, atoms = seen_atoms(model, ids, coding)
    values = seen(model, ids, sites)
    for index, site in enumerate(sites):
        if site.port == "probs":
            continue
        x = values[site.name].double()
        u = x - x.mean(0) if site.role in centring.SAFE else x
        scale = u.abs().amax(0) if granularity == "channel" else torch.ones(u.shape[1])
        u, gain = u / scale, scale.double().square().expand_as(u)
        second = (atoms.value[index] ** 2 + atoms.spread[index] ** 2) * atoms.errors()[index]
        assert float(second.sum()) == pytest.approx(float((u**2 * gain).mean()), rel=2e-3)
        assert float(atoms.maximum[index]) == pytest.approx(float(u.abs().max()), rel=1e-5)
        assert float(atoms.power()[index]) == pytest.approx(float(x.square().mean()), rel=2e-3)


def test_the_curvature_is_by_magnitude_about_the_mean(model: PreTrainedModel, ids: Tensor) -> None:
    sites = find_sites(model)
    values = seen(model, ids[:2], sites)
    means = averages(model, ids)
    found = measuring(CentredSensitivity(windows=2))(model, ids, sites, 2)
    plain = measuring(Sensitivity(windows=2))(model, ids, sites, 2)
    for name in ("total", "count"):
        assert torch.equal(found[f"plain_{name}"], plain[name])
        torch.testing.assert_close(found[name].sum(-1), plain[name].sum(-1))
    for index, site in enumerate(sites):
        if site.name in means:
            about = cell(values[site.name] - means[site.name]).flatten()
            expected = torch.bincount(about, minlength=CELLS).double()
            moved = (found["count"][index] - expected).abs().sum()
            assert float(moved) < 5e-3 * float(expected.sum())  # a mean's last bits
            assert float((plain["count"][index] - expected).abs().sum()) > 10 * float(moved)
        else:
            assert torch.equal(found["count"][index], plain["count"][index])


# --- the fit ---------------------------------------------------------------------------------------


@every_coding
def test_the_reported_error_is_that_of_the_values(
    model: PreTrainedModel, ids: Tensor, coding: Scaled
) -> None:
    """Squared errors over the power of x, on the very values that it was fitted to, centred or not."""
    conversion = stages.fit(model, ids, coding, distribution=Distribution(atoms=256))
    frame = Patching(len(ids)).run(model, ids, conversion, 2)
    assert frame["nmse"].to_numpy() == pytest.approx(frame["nmse_atoms"].to_numpy(), rel=0.03)
    spikes = dict(zip(conversion.neurons.sites, conversion.neurons.spikes.tolist(), strict=True))
    measured = (frame["spikes"] / frame["values"]).to_numpy()
    assert measured == pytest.approx(frame["site"].map(spikes).to_numpy(), rel=0.02)
    assert bool(conversion.neurons.fit.params["centre"].any(-1).sum() > 5)


def test_it_is_on_where_the_predicted_loss_is_lower(model: PreTrainedModel, ids: Tensor) -> None:
    """Against the fits of either kind alone, at every site; a spike's price counts too."""
    for mu in (0.0, 3.0):
        coding = Gated("gated", 3, 2, mu=mu, sensitivity=Sensitivity(windows=4), **CHANNEL)
        sites = find_sites(model)
        sketches = Capture().run(model, ids, sites, 2)
        atoms = Distribution(atoms=256).run(sketches).atoms
        costs = []
        for kind in (replace(coding, centre="none"), coding):
            statistics = {s.name: measuring(s)(model, ids, sites, 2) for s in kind.statistics}
            alone = kind.seen(replace(atoms, statistics=statistics))
            params = kind.fit(alone).params
            curvature = alone.statistics["sensitivity"]
            spikes = error_and_spikes(kind, alone, params)[1]
            price = mu * curvature["macs"] / curvature["macs"].sum()
            loss = predicted_loss(kind.quantise, alone, params, curvature)
            costs.append(loss + price * spikes)
        plain, about = costs
        fitted = stages.fit(model, ids, coding, distribution=Distribution(atoms=256)).neurons
        on = fitted.fit.params["centre"].any(-1)
        assert torch.equal(on, about < plain)
        inside = torch.tensor([site.role in CENTRED for site in sites])
        assert bool(on[inside].any()) and not bool(on[inside].all())


def test_without_a_sensitivity_attention_s_input_and_keys_stay(
    model: PreTrainedModel, ids: Tensor
) -> None:
    neurons = stages.fit(model, ids, CODINGS[1]).neurons
    on = neurons.fit.params["centre"].any(-1).tolist()
    assert {role for role, each in zip(neurons.roles, on, strict=True) if each} == {
        *("attn.v", "attn.out", "mlp.in", "mlp.down", "head.in")
    }


def test_a_fine_code_is_as_near_to_the_dense_model_as_without_means(
    model: PreTrainedModel, ids: Tensor, tokens: Draws
) -> None:
    other, far = tokens(2, 13), []
    with torch.no_grad():
        dense = model(other).logits
        for centre in ("none", "channel"):
            conversion = stages.fit(model, ids, Gated("gated", 16, 8, centre=centre))
            with stages.patched(model, conversion):
                far.append(float((model(other).logits - dense).norm() / dense.norm()))
    assert far[1] < max(2 * far[0], 1e-4)
