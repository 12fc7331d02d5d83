"""Atoms, densities, Bennett value, moments and sampler against closed forms, torch and scipy."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from stages import distribution
from stages.atoms import Atoms
from stages.codings.base import squared_error
from stages.codings.las import Las
from stages.codings.lloyd_max import LloydMax
from stages.distribution import Densities, Distribution, merge
from stages.errors import InputError
from stages.sketch import Accumulator, Grid, SketchSet


def sketches(*sites: Tensor, mantissa_bits: int = 7) -> SketchSet:
    grid = Grid(mantissa_bits)
    accumulators = [Accumulator(grid, 0, False, torch.device("cpu")) for _ in sites]
    for accumulator, x in zip(accumulators, sites, strict=True):
        accumulator.add(x)
    named = [(f"site{k}:in", "mlp.in", k) for k in range(len(sites))]
    return SketchSet.collect(named, grid, accumulators)


SIZE = 200_000


def samples(name: str, size: int = SIZE) -> Tensor:
    """Signed samples [size, 1]."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(size, 1, generator=generator)
    if name == "gaussian":
        return 2.5 * normal
    if name == "laplace":
        return 0.7 * normal.sign() * -torch.rand(size, 1, generator=generator).log()
    if name == "heavy":
        return normal * torch.exp(1.3 * torch.randn(size, 1, generator=generator)) + 0.02
    if name == "sparse":  # many exact zeros, none negative
        return (normal - 0.5).clamp(min=0)
    if name == "probabilities":
        return torch.softmax(4 * normal.view(-1, 50), -1).view(-1, 1)
    raise ValueError(name)


NAMES = ("gaussian", "laplace", "heavy", "sparse", "probabilities")


@pytest.fixture(scope="module")
def densities() -> Densities:
    return Distribution().run(sketches(*(samples(name) for name in NAMES)))


def every_value(x: Tensor) -> Atoms:
    """The data itself as atoms."""
    value = x.flatten().abs().double().sort().values[None]
    return Atoms(value, torch.zeros_like(value), torch.full_like(value, 1 / len(x)), value[:, -1])


# --- atoms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("atoms", [64, 256, 1024])
def test_atoms_keep_mean_and_power_of_their_sketch(atoms: int) -> None:
    sketch = sketches(*(samples(name, 20_000) for name in NAMES))
    found = Distribution(atoms).run(sketch).atoms
    count, mean, variance, negative = sketch.magnitudes()
    total = count.sum(-1)
    maximum = sketch.tensors["range"].abs().amax(-1).double()
    # The maximum is kept exactly, its bin's mean to an eighth of the bin.
    expected_mean = (count * mean).sum(-1) / total
    expected_power = (count * (mean**2 + variance)).sum(-1) / total
    torch.testing.assert_close(
        (found.value * found.weight).sum(-1), expected_mean, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(found.power(), expected_power, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.weight.sum(-1), torch.ones_like(total), rtol=1e-12, atol=0)
    assert found.value.shape == (len(NAMES), atoms)
    assert bool((found.value.diff(dim=-1) >= 0).all())
    assert bool((found.weight >= 0).all()) and bool((found.spread >= 0).all())
    assert torch.equal(found.maximum, maximum)


def test_extremes_are_exact(densities: Densities) -> None:
    for k, name in enumerate(NAMES):
        x = samples(name)
        top = float(x.abs().max())
        assert densities.tensors["extremes"][k].tolist() == [float(x.min()), float(x.max())]
        assert float(densities.atoms.maximum[k]) == top
        assert float(densities.atoms.scale()[k]) == top
        at_top = (densities.atoms.value[k] == top) & (densities.atoms.weight[k] > 0)
        assert float(densities.atoms.weight[k][at_top].sum()) * SIZE == pytest.approx(1)
        assert densities.atoms.spread[k][at_top].tolist() == [0]
        assert float(densities.atoms.value[k].max()) == top


def test_zeros_are_an_atom_of_their_own(densities: Densities) -> None:
    k = NAMES.index("sparse")
    share = float((samples("sparse") == 0).double().mean())
    assert share > 0.5
    atoms = densities.atoms
    assert float(atoms.weight[k][atoms.value[k] == 0].sum()) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("timesteps", [6, 8])
@pytest.mark.parametrize("v0", ["zero", "half_step"])
def test_merging_costs_less_than_two_per_cent_of_the_error(
    timesteps: int, v0: str, densities: Densities
) -> None:
    coding = Las("las", timesteps, v0)
    p = {"scale": densities.atoms.scale()[:, None]}
    found = squared_error(coding, densities.atoms, p)
    for k, name in enumerate(NAMES):
        exact = squared_error(coding, every_value(samples(name)), {"scale": p["scale"][k][None]})
        assert float(found[k]) == pytest.approx(float(exact), rel=0.02), name


def test_the_error_bound_fails_for_few_atoms() -> None:
    few = Distribution(64).run(sketches(*(samples(name) for name in NAMES))).atoms
    p = {"scale": few.scale()[:, None]}
    coding = Las("las", 8, "half_step")
    ratio = [
        float(found / squared_error(coding, every_value(samples(name)), {"scale": scale[None]}))
        for name, found, scale in zip(NAMES, squared_error(coding, few, p), p["scale"], strict=True)
    ]
    assert max(abs(r - 1) for r in ratio) > 0.05, ratio


def test_points_keep_mean_and_variance() -> None:
    atoms = Atoms(*(torch.rand(2, 5, dtype=torch.float64) for _ in range(3)), torch.ones(2))
    atoms = Atoms(atoms.value + 5, atoms.spread, atoms.weight, atoms.maximum)
    for inside in (2, 3, 5):
        x, weight = (t.view(2, 5, inside) for t in atoms.points(inside))
        torch.testing.assert_close(x.mean(-1), atoms.value)
        torch.testing.assert_close(x.std(-1, correction=0), atoms.spread)
        torch.testing.assert_close(weight.sum(-1), atoms.weight)


def test_few_values_are_atoms_as_they_are() -> None:
    x = torch.tensor([-3.0, 0.0, 0.0, 1.5, 1.5, 1.5, 3.0, 2.0])[:, None]
    atoms = Distribution(64).run(sketches(x)).atoms
    used = atoms.weight[0] > 0
    weight: dict[float, float] = {}
    for value, share in zip(
        atoms.value[0][used].tolist(), atoms.weight[0][used].tolist(), strict=True
    ):
        near = round(value, 2)
        assert abs(value - near) <= near * 2**-10  # known to an eighth of a bin
        weight[near] = weight.get(near, 0) + share
    assert weight == {0.0: 2 / 8, 1.5: 3 / 8, 2.0: 1 / 8, 3.0: 2 / 8}
    assert (atoms.spread[0][used] <= atoms.value[0][used] * 2**-10).all()


def test_merging_needs_the_p_to_the_third_mass() -> None:
    """Where bins are merged, atoms hold equal shares of the p^(1/3) mass."""
    sketch = sketches(samples("gaussian"))
    count, mean, variance, negative = sketch.magnitudes()
    edges = sketch.grid.edges()
    top = sketch.tensors["range"].abs().amax(-1).double()
    atoms = merge(count, mean, variance, edges, top, 128, negative)
    width = edges.diff()
    mass = ((count / width) ** (1 / 3) * width)[0]
    mass[0] = 0
    inside = atoms.value[0][atoms.weight[0] > 1e-4]
    body = inside[(inside > 0.5) & (inside < 6)]
    below = torch.stack([mass[mean[0] < v].sum() for v in body]) / mass.sum()
    steps = below.diff()
    assert float(steps.std() / steps.mean()) < 0.6
    assert float(steps.mean()) == pytest.approx(1 / (128 - 19), rel=0.1)


# --- densities ------------------------------------------------------------------------------------


def test_the_density_integrates_to_what_is_not_zero(densities: Densities) -> None:
    width = densities.tensors["edges"].diff()
    for k, name in enumerate(NAMES):
        nonzero = float((samples(name).abs() >= 2.0**-40).double().mean())
        assert float((densities.tensors["density"][k] * width).sum()) == pytest.approx(nonzero)
        assert float((densities.tensors["optimal"][k] * width).sum()) == pytest.approx(1)


def test_the_density_is_that_of_a_gaussian(densities: Densities) -> None:
    edges = densities.tensors["edges"].numpy()
    middle = np.sqrt(edges[1:] * edges[:-1])
    clear = (middle > 0.1) & (middle < 6)
    truth = np.diff(stats.halfnorm(scale=2.5).cdf(edges)) / np.diff(edges)
    found = densities.tensors["density"][0].numpy()
    np.testing.assert_allclose(found[clear], truth[clear], rtol=0.1)


def test_the_optimal_density_is_the_cube_root(densities: Densities) -> None:
    density, optimal = densities.tensors["density"], densities.tensors["optimal"]
    filled = density > 0
    assert bool((optimal[~filled] == 0).all())
    for k in range(len(NAMES)):
        ratio = optimal[k][filled[k]] / density[k][filled[k]] ** (1 / 3)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_the_bennett_value_has_its_closed_form(densities: Densities) -> None:
    """(integral p^(1/3))^3 over the magnitudes up to the maximum M (Panter & Dite 1951): a quarter
    of the two-sided value, as the sign is free. Gaussian: 3 sqrt(3) pi sigma^2 / 2 times
    erf(M / sqrt(6) sigma)^3. Laplace: 27 b^2 (1 - exp(-M / 3b))^3."""
    top = densities.atoms.maximum.numpy()
    gaussian = 1.5 * 3**0.5 * np.pi * 2.5**2 * special.erf(top[0] / (6**0.5 * 2.5)) ** 3
    laplace = 27 * 0.7**2 * (1 - np.exp(-top[1] / (3 * 0.7))) ** 3
    found = densities.tensors["bennett"]
    assert float(found[0]) == pytest.approx(gaussian, rel=0.03)
    assert float(found[1]) == pytest.approx(laplace, rel=0.05)


def test_the_bennett_value_predicts_the_optimal_quantiser(densities: Densities) -> None:
    """L optimal magnitudes cost bennett / (12 L^2), as L grows."""
    coding = LloydMax("lloyd_max", 7)
    error = squared_error(coding, densities.atoms, coding.fit(densities.atoms).params)
    expected = densities.tensors["bennett"] / (12 * 4**7)
    torch.testing.assert_close(error[:2], expected[:2], rtol=0.1, atol=0)


def test_moments_are_those_of_the_values(densities: Densities) -> None:
    for k, name in enumerate(NAMES):
        x = samples(name).double().flatten()
        count, mean, variance, kurtosis = densities.tensors["moments"][k].tolist()
        assert count == SIZE
        assert mean == pytest.approx(float(x.mean()), rel=1e-4, abs=1e-5)
        assert variance == pytest.approx(float(x.var(correction=0)), rel=1e-3)
        expected = stats.kurtosis(x.numpy(), fisher=False)
        assert kurtosis == pytest.approx(float(expected), rel=5e-3), name
    assert float(densities.tensors["moments"][0, 3]) == pytest.approx(3, abs=0.1)
    assert float(densities.tensors["moments"][1, 3]) == pytest.approx(6, abs=0.3)


# --- sampler --------------------------------------------------------------------------------------


def test_the_sampler_follows_the_distribution(densities: Densities) -> None:
    drawn = densities.sample(20_000, torch.Generator().manual_seed(1))
    assert drawn.shape == (len(NAMES), 20_000)
    for k, name in enumerate(NAMES):
        truth = samples(name).abs().flatten()
        assert bool((drawn[k] >= 0).all()) and bool((drawn[k] <= truth.max()).all())
        assert stats.ks_2samp(drawn[k].numpy(), truth.numpy()).statistic < 0.015, name
        other = samples(NAMES[k - 1]).abs().flatten()
        assert stats.ks_2samp(drawn[k].numpy(), other.numpy()).statistic > 0.1, name


def test_the_sampler_is_its_generator(densities: Densities) -> None:
    first = densities.sample(500, torch.Generator().manual_seed(7))
    assert torch.equal(first, densities.sample(500, torch.Generator().manual_seed(7)))
    assert not torch.equal(first, densities.sample(500, torch.Generator().manual_seed(8)))


def test_sites_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = sketches(*(samples(name, 2_000) for name in NAMES))
    found = []
    for number in (1, 2, len(NAMES) + 1):
        monkeypatch.setattr(distribution, "SITES_AT_ONCE", number)
        densities = Distribution(64).run(made)
        drawn = densities.sample(50, torch.Generator().manual_seed(7))
        atoms = {name: t for name, t in vars(densities.atoms).items() if isinstance(t, Tensor)}
        found.append(densities.tensors | atoms | {"drawn": drawn})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())


def test_only_filled_bins_are_kept(densities: Densities) -> None:
    made = sketches(*(samples(name) for name in NAMES))
    count, mean, _, _ = made.magnitudes()
    offsets = densities.tensors["bin_offsets"].tolist()
    assert offsets[0] == 0 and offsets[-1] == int((count > 0).sum())
    for site, (start, stop) in enumerate(pairwise(offsets)):
        filled = count[site] > 0
        assert torch.equal(densities.tensors["bin_count"][start:stop], count[site][filled])
        assert torch.equal(densities.tensors["bin_mean"][start:stop], mean[site][filled])


# --- files and errors -----------------------------------------------------------------------------


def test_saved_and_loaded(densities: Densities, tmp_path: Path) -> None:
    densities.save(tmp_path)
    after = Densities.load(tmp_path)
    assert (after.sites, after.roles, after.layers) == (
        densities.sites,
        densities.roles,
        densities.layers,
    )
    for name in ("value", "spread", "weight", "maximum"):
        assert torch.equal(getattr(after.atoms, name), getattr(densities.atoms, name))
    assert after.tensors.keys() == densities.tensors.keys()
    for name, tensor in densities.tensors.items():
        assert torch.equal(after.tensors[name], tensor)


@pytest.mark.parametrize("constant", [0.0, 1.25, -3.0])
def test_a_constant_site_is_an_error_with_its_name(constant: float) -> None:
    good = samples("gaussian", 500)
    told = rf"1 of 3 sites hold one constant value.* site1:in \({constant:g}\); .*sites.exclude="
    with pytest.raises(InputError, match=told):
        Distribution().run(sketches(good, torch.full((40, 1), constant), good))


@pytest.mark.parametrize("atoms", [0, 63, 100.0])
def test_too_few_atoms_are_refused(atoms: int) -> None:
    with pytest.raises(InputError, match=r"distribution\.atoms=.*at least 64"):
        Distribution(atoms)
