"""Channels with scales of their own: how those are measured, fitted with, coded with, and counted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import stages
from stages.capture import Capture
from stages.codings.base import Coding, Scaled, site_params
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.codings.multigrain import Multigrain
from stages.codings.oat import Oat
from stages.codings.rate import Rate
from stages.codings.two_spike import TwoSpike
from stages.distribution import Densities, Distribution
from stages.errors import InputError
from stages.fits.algorithm1 import Algorithm1
from stages.fits.sensitivity import Sensitivity
from stages.fits.statistics import ChannelScale
from stages.fitting import Fitting
from stages.model.sites import Site, find_sites
from stages.neurons.channels import per_channel, unscaled
from stages.ports.counters import Counters
from stages.ports.kernels import row_kernel
from stages.ports.patched import patched
from stages.ports.planes import planes
from stages.statistics import measuring
from tests.codings.reference import atoms_of, definition, heavy_tailed
from tests.codings.values import seen
from tests.transforms.held import compare

CHANNEL: dict[str, Any] = {"granularity": "channel"}
QUICK = Algorithm1(rounds=1, neuron_steps=3, base_steps=3)
CODINGS: list[Scaled] = [
    Rate("rate", 8, levels=5, quantile=0.9, **CHANNEL),
    Las("las_rounded", 5, "half_step", **CHANNEL),
    Oat("oat", 4, "half_step", 95.0, quantile=0.95, **CHANNEL),
    TwoSpike("two_spike", 5, **CHANNEL),
    Multigrain("multigrain", 5, 2, algorithm1=QUICK, **CHANNEL),
    Gated("gated", 4, 2, **CHANNEL),
    Gated("gated", 4, 2, offset=True, quantile=0.9, **CHANNEL),
]
every_coding = pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.name}-{c.quantile}")
Draws = Callable[..., Tensor]


@pytest.fixture
def ids(tokens: Draws) -> Tensor:
    return tokens(4, 16, seed=1)


def densities_of(model: PreTrainedModel, ids: Tensor, sites: list[Site]) -> Densities:
    return Distribution(atoms=64).run(Capture().run(model, ids, sites, 2))


# --- the statistic --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_the_scale_is_the_quantile_of_every_channel(
    tiny: Callable[..., PreTrainedModel], ids: Tensor, family: str, quantile: float
) -> None:
    model = tiny(family)
    sites = find_sites(model)
    found = measuring(ChannelScale(quantile))(model, ids, sites, 2)
    values = seen(model, ids, sites)
    for index, site in enumerate(sites):
        if site.port == "probs":
            assert found["channels"][index] == 0 and bool((found["scale"][index] == 1).all())
            continue
        x = values[site.name].abs().numpy()
        assert found["channels"][index] == x.shape[1]
        scale = found["scale"][index, : x.shape[1]]
        expected = np.quantile(x, quantile, axis=0, method="inverted_cdf")
        positive = expected > 0  # a ReLU leaves many values at zero
        assert scale[torch.from_numpy(positive)].tolist() == expected[positive].tolist()
        assert bool((scale > 0).all()) and bool((found["scale"][index, x.shape[1] :] == 1).all())


def test_a_channel_that_is_mostly_or_always_zero_has_a_scale(
    model: PreTrainedModel, ids: Tensor
) -> None:
    """The largest value of the one, the largest scale of the site of the other."""
    up = next(site for site in find_sites(model) if site.role == "mlp.up")
    with torch.no_grad():
        model.get_submodule(up.path).weight[0] = 0
    found = measuring(ChannelScale(0.9))(model, ids, find_sites(model), 4)
    row = [site.name for site in find_sites(model)].index(up.name)
    scale = found["scale"][row, : int(found["channels"][row])]
    assert scale[0] == scale.amax() and (scale == scale.amax()).sum() == 2


def test_the_atoms_are_those_of_values_over_scales(model: PreTrainedModel, ids: Tensor) -> None:
    sites = find_sites(model)
    found = measuring(ChannelScale(0.9))(model, ids, sites, 2)
    coding = Las("las", 6, quantile=0.9, **CHANNEL)
    whole = densities_of(model, ids, sites).atoms
    atoms = coding.seen(replace(whole, statistics={"channel_scale": found}))
    values = seen(model, ids, sites)
    torch.testing.assert_close(atoms.weight.sum(-1), torch.ones(len(sites)).double())
    for index, site in enumerate(sites):
        if site.port == "probs":
            assert float(atoms.power()[index]) == pytest.approx(float(whole.power()[index]))
            continue
        x = values[site.name].double()
        scale = found["scale"][index, : x.shape[1]].double()
        u = (x / scale).abs()
        assert float(atoms.power()[index]) == pytest.approx(float(x.square().mean()), rel=2e-3)
        assert float(atoms.maximum[index]) == pytest.approx(float(u.max()), rel=1e-6)
        mean = float((atoms.weight[index] * atoms.value[index]).sum())
        assert mean == pytest.approx(float(u.mean()), rel=2e-3)
        negative = float((atoms.weight[index] * atoms.negative[index]).sum())  # type: ignore[index]
        assert negative == pytest.approx(float((x < 0).double().mean()), abs=1e-6)


# --- the fit --------------------------------------------------------------------------------------


@every_coding
def test_the_reported_error_is_that_of_the_values(
    model: PreTrainedModel, ids: Tensor, coding: Scaled
) -> None:
    """On the very values that it was fitted to, all sites; a channel's scale given to its neighbour
    does worse."""
    conversion = stages.fit(model, ids, coding, distribution=Distribution(atoms=256))
    neurons, values = conversion.neurons, seen(model, ids, find_sites(model))
    worse = []
    for index, site in enumerate(neurons.sites):
        if site not in values:
            continue
        p, x = site_params(neurons.fit.params, index), values[site][None]
        value, spikes = row_kernel(coding, True)(x, p)
        error = float((value - x).square().mean() / x.square().mean())
        assert float(neurons.nmse[index]) == pytest.approx(error, rel=0.12)
        assert float(neurons.spikes[index]) == pytest.approx(
            float(spikes.mean()) / x.shape[-1], rel=0.05
        )
        rolled = p | {"channel": p["channel"][: x.shape[-1]].roll(1)}
        wrong = row_kernel(coding, True)(x, rolled)[0]
        worse.append(float((wrong - x).square().mean()) > float((value - x).square().mean()))
    assert sum(worse) > 0.8 * len(worse)


def test_wide_channels_beside_narrow_ones_gain_most(model: PreTrainedModel) -> None:
    """Channels 16 times apart: 6 bits a channel do what takes a site 2 to 4 bits more."""
    x = torch.randn(1, 4000, 8, generator=torch.Generator().manual_seed(0))
    x = x * 16.0 ** torch.linspace(0, 1, 8)
    scale = x.abs().amax((0, 1))
    site = Las("las_rounded", 6, "half_step")
    one = {name: value[0] for name, value in site.fit(atoms_of(x.reshape(1, -1))).params.items()}
    channel = replace(site, granularity="channel")
    p = {"scale": torch.ones(1), "channel": scale}
    errors = [
        float((row_kernel(c, False)(x, q)[0] - x).square().mean((0, 1))[0])  # of the narrow one
        for c, q in ((site, one), (channel, p))
    ]
    assert 4.0**3 < errors[0] / errors[1] < 4.0**4.5


def test_a_quantile_of_a_site_clips_it() -> None:
    x = heavy_tailed(2, 1000)
    for coding in (Rate("rate", 8), Las("las", 6), TwoSpike("two_spike", 6)):
        fit = replace(coding, quantile=0.9).fit(atoms_of(x))
        expected = np.quantile(x.abs().double().numpy(), 0.9, axis=1, method="inverted_cdf")
        assert fit.params["scale"].flatten().tolist() == expected.astype(np.float32).tolist()
        assert (coding.fit(atoms_of(x)).params["scale"].flatten() == x.abs().amax(-1)).all()


# --- the code -------------------------------------------------------------------------------------


@every_coding
@pytest.mark.parametrize("shape", [(2, 3, 12), (2, 3, 5, 4)], ids=["features", "heads"])
def test_every_channel_is_the_scalar_neuron_of_its_scale(
    coding: Scaled, shape: tuple[int, ...]
) -> None:
    site = replace(coding, granularity="site", quantile=1.0)
    fit = site.fit(atoms_of(heavy_tailed(1, 200) / 20))
    p = {name: value[0].float() for name, value in fit.params.items()}
    generator = torch.Generator().manual_seed(1)
    width = 12
    channel = 0.1 + torch.rand(width + 3, generator=generator)  # filled up beyond the channels
    x = torch.randn(shape, generator=generator)
    value, spikes = row_kernel(coding, True)(x, p | {"channel": channel})
    stepped, count = planes(coding, x, p | {"channel": channel})
    neuron = definition(site, p)
    rows = (x.transpose(1, 2) if x.dim() == 4 else x).reshape(-1, width)
    expected, counts = torch.zeros_like(rows), torch.zeros_like(rows)
    for r, row in enumerate(rows):
        for c, number in enumerate(row):
            s = channel[c]
            _, magnitude, n = neuron((number / s).abs().numpy()[()])
            expected[r, c], counts[r, c] = number.sign() * float(magnitude) * s, float(n)

    def laid_out(t: Tensor) -> Tensor:
        if x.dim() == 3:
            return t.view(shape)
        return t.view(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)

    assert torch.equal(value, laid_out(expected))
    assert torch.equal(count.float(), laid_out(counts))
    assert torch.equal(spikes.view(x.shape[:-1]), laid_out(counts).sum(-1))
    torch.testing.assert_close(stepped.value(), laid_out(expected), rtol=1e-5, atol=1e-6)
    every = torch.stack([plane for each in stepped.accumulators for plane in each.plane])
    assert int(every.abs().max()) <= 1
    inside, scale = (
        coding.quantise(x / per_channel(channel, x, 1.0), p)[1],
        unscaled({"channel": x}),
    )
    assert torch.equal(inside, count.float()) and scale == {}


@every_coding
def test_the_stepped_model_is_the_fast_one_with_the_same_spikes(
    model: PreTrainedModel, ids: Tensor, tokens: Draws, coding: Scaled
) -> None:
    found = compare(model, stages.fit(model, ids, coding), tokens(2, 13))
    assert len(found.far) == len(find_sites(model))
    assert max(found.far.values()) < 1e-5 and found.logits < 1e-5
    assert torch.equal(*found.counters)


def test_a_folder_keeps_the_scales(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    stages.convert(model, ids, CODINGS[0])
    with torch.no_grad():
        logits = model(ids).logits
        stages.save(model, tmp_path / "saved")
        again = stages.load(tmp_path / "saved")
        assert torch.equal(again(ids).logits, logits)
    assert stages.conversion(again).coding == CODINGS[0]
    assert "channel" in stages.conversion(again).neurons.fit.params


# --- what it costs, and what is refused -----------------------------------------------------------


def test_a_multiplication_of_every_value_is_counted(
    model: PreTrainedModel, ids: Tensor, energy: Any
) -> None:
    from stages.analysis.operations import operations
    from stages.energy import account

    plan, sites = operations(model, find_sites(model)), find_sites(model)
    frames = []
    for coding in (CODINGS[1], replace(CODINGS[1], granularity="site")):
        conversion = stages.fit(model, ids, coding)
        counters = Counters(sites, "cpu")
        with torch.no_grad(), patched(model, conversion, counters):
            model(ids, use_cache=False)
        frame = account(plan, energy, 16, counters.of(conversion), coding)
        frames.append(frame.query("phase == 'prefill' and kind == 'decode_scaling'"))
    work = {o.name: o.work.per_token for o in plan if o.kind == "gate"}
    assert sum(value > 0 for value in work.values()) == len(work) - 2  # but the probabilities
    for convention, settings in energy.conventions.items():
        more, less = (f[f["convention"] == convention]["macs"].sum() for f in frames)
        expected = 16 * sum(work.values()) if settings.decode_scaling else 0
        assert more - less == pytest.approx(expected)
    assert not CODINGS[0].shares_levels and CODINGS[0].value_macs == 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Las("las", 6, granularity="token"), "granularity='token'.*site or channel"),
        (lambda: Las("las", 6, quantile=0.2), "quantile=0.2.*0.5 to 1"),
        (lambda: Gated("gated", 4, 2, quantile=0.9), "quantile=0.9.*ranges are searched"),
        (lambda: Gated("gated", 4, 2, sensitivity=Sensitivity(), **CHANNEL), "with a sensitivity"),
        (lambda: Multigrain(tau="running_maximum", **CHANNEL), "tau=running_maximum"),
        (lambda: Multigrain(tau="running_maximum", quantile=0.9), "tau=running_maximum"),
        (
            lambda: Multigrain(algorithm1=Algorithm1(slope_units="absolute"), **CHANNEL),
            "slope_units=absolute",
        ),
        (lambda: Rate("rate", 8, levels=9), "levels=9.*number of timesteps"),
        (lambda: Rate("rate", 65), "timesteps=65.*1 to 64"),
        (lambda: ChannelScale(0.0), "quantile=0.0"),
    ],
)
def test_what_does_not_go_together_is_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()


def test_samples_and_experts_are_refused(
    model: PreTrainedModel, ids: Tensor, tiny: Callable[..., PreTrainedModel]
) -> None:
    sites = find_sites(model)
    coding: Coding = Multigrain(algorithm1=QUICK, **CHANNEL)
    statistics = {"channel_scale": measuring(ChannelScale())(model, ids, sites, 2)}
    with pytest.raises(InputError, match="fitting.data=samples"):
        Fitting("samples", 100).run(densities_of(model, ids, sites), coding, statistics)
    with pytest.raises(InputError, match="not defined on experts.*granularity=site"):
        stages.fit(tiny("mixtral"), ids, coding, capture=Capture(unreached="dense"))
