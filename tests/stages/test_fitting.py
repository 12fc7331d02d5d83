"""The fitting stage: what it fits on, what it reports and what it keeps of its settings."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.codings.base import Coding, site_params
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.codings.lloyd_max import LloydMax
from stages.codings.multigrain import Multigrain
from stages.codings.phase import Phase
from stages.distribution import Densities, Distribution
from stages.errors import InputError
from stages.fits.algorithm1 import Algorithm1
from stages.fitted import FittedNeurons
from stages.fitting import Fitting
from stages.sketch import Accumulator, Grid, SketchSet

QUICK = Algorithm1(rounds=2, neuron_steps=5, base_steps=5, neuron_lr=2e-3, base_lr=2e-3, slope=100)
ATOMS = Fitting("atoms", 1000, 0)
CODINGS: list[Coding] = [
    Las("las", 6, "zero"),
    Las("las_rounded", 6, "half_step"),
    Phase("phase", 6, 1, "half_step", True, algorithm1=QUICK),
    Multigrain("multigrain", 6, 2, "half_step", False, algorithm1=QUICK),
    Gated("gated", 6, 1),
    Gated("gated", 6, 2),
    Gated("gated", 6, 3),
    LloydMax("lloyd_max", 6),
]


def values(sites: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sites, size, 1, generator=generator)
    x = x * torch.exp(torch.randn(sites, size, 1, generator=generator))
    return x * 2.0 ** torch.arange(sites)[:, None, None]


@pytest.fixture(scope="module")
def densities() -> Densities:
    x = values(3, 100_000)
    accumulators = [Accumulator(Grid(7), 0, False, torch.device("cpu")) for _ in x]
    for accumulator, own in zip(accumulators, x, strict=True):
        accumulator.add(own)
    named = [(f"site{k}:in", "mlp.in", k) for k in range(3)]
    return Distribution().run(SketchSet.collect(named, Grid(7), accumulators))


@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.name}-{c.grains}")
def test_the_reported_error_and_spikes_are_those_of_the_values(
    coding: Coding, densities: Densities
) -> None:
    fitted = ATOMS.run(densities, coding)
    for k, x in enumerate(values(3, 100_000)[..., 0]):
        coded, spikes = coding.quantise(x, site_params(fitted.fit.params, k))
        nmse = float((coded.double() - x).square().mean() / x.double().square().mean())
        assert float(fitted.nmse[k]) == pytest.approx(nmse, rel=0.03)
        if coding.neuron:
            assert float(fitted.spikes[k]) == pytest.approx(float(spikes.mean()), rel=0.02)
        else:
            assert fitted.spikes.isnan().all()
    assert all(value.dtype == torch.float32 for value in fitted.fit.params.values())
    assert all(len(value) == 3 for value in fitted.fit.params.values())
    assert (fitted.fit.curve is not None) == coding.trained


@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.name}-{c.grains}")
def test_sites_at_once_change_no_report(
    coding: Coding, densities: Densities, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ATOMS.run(densities, coding)
    monkeypatch.setattr("stages.codings.base.SITES_AT_ONCE", 1)
    apart = ATOMS.run(densities, coding)
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}  # a bound has no spikes
    torch.testing.assert_close(apart.nmse, whole.nmse, **exact)
    torch.testing.assert_close(apart.spikes, whole.spikes, **exact)


def test_the_error_report_fails_for_parameters_of_another_site(densities: Densities) -> None:
    fitted = ATOMS.run(densities, Gated("gated", 6, 2))
    x = values(3, 100_000)[0, :, 0]
    coded, _ = Gated("gated", 6, 2).quantise(x, site_params(fitted.fit.params, 2))
    nmse = float((coded.double() - x).square().mean() / x.double().square().mean())
    assert nmse > 1.5 * float(fitted.nmse[0])


def test_held_out_values_cost_about_the_same_within_the_range_seen(densities: Densities) -> None:
    fitted = ATOMS.run(densities, Gated("gated", 6, 3))
    for k, x in enumerate(values(3, 100_000, seed=1)[..., 0]):
        x = x[x.abs() <= densities.atoms.maximum[k]]
        coded, _ = Gated("gated", 6, 3).quantise(x, site_params(fitted.fit.params, k))
        error = float((coded.double() - x).square().mean() / densities.atoms.power()[k])
        assert float(fitted.nmse[k]) == pytest.approx(error, rel=0.2)


def test_samples_are_drawn_by_seed_and_agree_with_atoms(densities: Densities) -> None:
    coding = Multigrain("multigrain", 6, 2, "zero", False, algorithm1=QUICK)
    drawn = Fitting("samples", 4000, 3)
    first, again = drawn.run(densities, coding), drawn.run(densities, coding)
    other = replace(drawn, seed=4).run(densities, coding)
    for name, value in first.fit.params.items():
        assert torch.equal(again.fit.params[name], value)
    assert not torch.equal(other.fit.params["base_d"], first.fit.params["base_d"])
    atoms = ATOMS.run(densities, coding)
    torch.testing.assert_close(first.fit.params["scale"], atoms.fit.params["scale"])
    # Both are judged on the atoms; training on samples of them costs little.
    assert bool((first.nmse < 1.15 * atoms.nmse).all())
    start = Las("las", 6, "zero")
    assert bool((first.nmse < 0.9 * ATOMS.run(densities, start).nmse).all())


def test_training_never_worsens_its_start(densities: Densities) -> None:
    rounded = ATOMS.run(densities, Las("las_rounded", 6, "half_step"))
    for coding in (Phase("phase", 6, 1, "half_step", True, algorithm1=QUICK), CODINGS[3]):
        assert bool((ATOMS.run(densities, coding).nmse <= rounded.nmse * (1 + 1e-6)).all())


def test_more_ranges_and_the_bound_order_the_errors(densities: Densities) -> None:
    error = [ATOMS.run(densities, coding).nmse for coding in CODINGS]
    las, rounded, _, _, one, two, three, bound = error
    assert bool((rounded < las / 2).all())
    assert bool((three < two).all() and (two < one).all() and (bound < one).all())


def test_settings_that_a_coding_does_not_use_are_left_out() -> None:
    """So they do not enter the key of its artifact."""
    plain = Fitting("atoms", 1, 0)
    for coding in (Las("las", 6, "zero"), Gated("gated", 6, 2), LloydMax("lloyd_max", 6)):
        assert Fitting("samples", 5000, 3).for_coding(coding) == plain
        assert ATOMS.for_coding(coding) == plain
    trained = Multigrain("multigrain", 6, 2, "zero", False, algorithm1=QUICK)
    assert Fitting("samples", 5000, 3).for_coding(trained) == Fitting("samples", 5000, 3)
    assert Fitting("atoms", 5000, 3).for_coding(trained) == plain


def test_for_coding_leaves_out_nothing_that_matters(densities: Densities) -> None:
    for coding in (CODINGS[5], CODINGS[3]):
        whole = ATOMS.run(densities, coding)
        reduced = ATOMS.for_coding(coding).run(densities, coding)
        for name, value in whole.fit.params.items():
            assert torch.equal(reduced.fit.params[name], value)


@pytest.mark.parametrize("coding", [CODINGS[1], CODINGS[3]], ids=lambda c: c.name)
def test_saved_and_loaded(coding: Coding, densities: Densities, tmp_path: Path) -> None:
    before = ATOMS.run(densities, coding)
    before.save(tmp_path)
    after = FittedNeurons.load(tmp_path)
    assert (after.sites, after.roles, after.layers) == (before.sites, before.roles, before.layers)
    assert after.fit.params.keys() == before.fit.params.keys()
    for name, value in before.fit.params.items():
        assert torch.equal(after.fit.params[name], value)
    assert torch.equal(after.nmse, before.nmse) and torch.equal(after.spikes, before.spikes)
    if before.fit.curve is None:
        assert after.fit.curve is None
    else:
        assert after.fit.curve is not None and torch.equal(after.fit.curve, before.fit.curve)


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": -1},
        {"neuron_steps": -1},
        {"neuron_lr": 0.0},
        {"base_lr": -1e-3},
        {"slope": 0.0},
    ],
)
def test_settings_of_algorithm_1_that_cannot_be_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"coding\.algorithm1=") as caught:
        replace(QUICK, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"rounds": 0}, {"neuron_steps": 0, "base_steps": 0}])
def test_no_training_leaves_binary_phase_coding(
    change: dict[str, int], densities: Densities
) -> None:
    still = replace(QUICK, **change)
    coding = Multigrain("multigrain", 6, 2, "half_step", False, algorithm1=still)
    fitted = ATOMS.run(densities, coding)
    binary = ATOMS.run(densities, Las("las_rounded", 6, "half_step"))
    assert fitted.fit.curve is not None and fitted.fit.curve.shape == (3, 1)
    torch.testing.assert_close(fitted.nmse, binary.nmse)
    for name in ("d", "h", "theta"):
        expected = (2.0 ** -torch.arange(1.0, 7)).expand(3, 6)
        assert torch.equal(fitted.fit.params[name], expected)


@pytest.mark.parametrize("change", [{"data": "histogram"}, {"samples": 0}])
def test_data_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"fitting\.data="):
        replace(ATOMS, **change)
