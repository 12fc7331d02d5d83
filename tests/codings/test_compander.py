"""Companded levels against Panter and Dite's value, closed forms and the bound; error by quantile."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from stages.analysis.quantiles import error_by_quantile
from stages.atoms import Atoms
from stages.codings.base import squared_error
from stages.codings.compander import Compander, panter_dite
from stages.codings.las import Las
from stages.codings.lloyd_max import LloydMax
from stages.errors import InputError
from tests.codings.reference import atoms_of, heavy_tailed

THIRD = 1 / 3
TOPS = {"gaussian": (stats.halfnorm, 8.0), "laplace": (stats.expon, 40.0)}
# Squared error of N = 2 L levels, L of each sign, times N^2, in units of the variance.
FULL_LINE = {"gaussian": math.sqrt(3) * math.pi / 2, "laplace": 9 / 2}
VARIANCE = {"gaussian": 1.0, "laplace": 2.0}


def known(name: str, cells: int = 60_000) -> Atoms:
    """The magnitudes of a unit Gaussian or Laplace variable as narrow cells."""
    distribution, top = TOPS[name]
    edges = np.linspace(0, top, cells + 1)
    weight = torch.from_numpy(-np.diff(distribution.sf(edges)))[None]
    value = torch.from_numpy((edges[1:] + edges[:-1]) / 2)[None]
    spread = torch.full_like(value, top / cells / math.sqrt(12))
    maximum = torch.tensor([top], dtype=torch.float64)
    return Atoms(value, spread, weight / weight.sum(), maximum)


def error(atoms: Atoms, timesteps: int, alpha: float) -> float:
    coding = Compander("compander", timesteps, alpha)
    return float(squared_error(coding, atoms, coding.fit(atoms).params))


@pytest.mark.parametrize("name", TOPS)
def test_the_value_of_panter_and_dite_has_its_closed_form(name: str) -> None:
    for levels in (16, 1024):
        expected = FULL_LINE[name] * VARIANCE[name] / (2 * levels) ** 2
        assert float(panter_dite(known(name), levels)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", TOPS)
def test_the_error_approaches_that_value(name: str) -> None:
    atoms = known(name)
    steps = range(4, 11)
    away = [abs(error(atoms, t, THIRD) / float(panter_dite(atoms, 2**t)) - 1) for t in steps]
    assert away == sorted(away, reverse=True)
    assert away[0] < 0.05 and away[-1] < 0.002


@pytest.mark.parametrize("name", TOPS)
def test_a_third_is_the_best_exponent(name: str) -> None:
    atoms = known(name)
    alphas = (0.0, 0.1, 0.2, 0.3, THIRD, 0.37, 0.45, 0.6, 0.8, 1.0)
    errors = [error(atoms, 9, alpha) for alpha in alphas]
    third = alphas.index(THIRD)
    assert errors[: third + 1] == sorted(errors[: third + 1], reverse=True)
    assert errors[third:] == sorted(errors[third:])


@pytest.mark.parametrize("timesteps", [1, 3, 6, 8])
def test_lloyd_max_is_at_or_below_it(timesteps: int) -> None:
    x = heavy_tailed(12, 1500, seed=3)
    x = x.sign() * x.abs() ** torch.linspace(0.4, 1.8, 12)[:, None]
    x[::4, :400] = 0
    for atoms in (atoms_of(x), known("gaussian", 4000)):
        bound = LloydMax("lloyd_max", timesteps)
        least = squared_error(bound, atoms, bound.fit(atoms).params)
        for alpha in (0.0, THIRD, 1.0):
            coding = Compander("compander", timesteps, alpha)
            found = squared_error(coding, atoms, coding.fit(atoms).params)
            assert bool((least <= found * (1 + 1e-6)).all())


def test_zeros_and_unused_places_attract_no_level() -> None:
    """Neither zeros nor places of no weight move a level; the error and the value shrink with the
    share of what is not zero."""
    plain = known("laplace", 500)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    pads = plain.maximum.expand(1, 7)
    mixed = Atoms(
        torch.cat([zero, plain.value, pads], -1),
        torch.cat([zero, plain.spread, 0 * pads], -1),
        torch.cat([zero + 0.75, plain.weight / 4, 0 * pads], -1),
        plain.maximum,
    )
    for alpha in (0.0, THIRD, 1.0):
        coding = Compander("compander", 5, alpha)
        one, other = (coding.fit(atoms).params["levels"] for atoms in (plain, mixed))
        torch.testing.assert_close(one, other)
    assert float(panter_dite(mixed, 32) / panter_dite(plain, 32)) == pytest.approx(0.25)


def test_every_site_is_fitted_alone_and_its_levels_ascend_inside_the_range() -> None:
    atoms = atoms_of(heavy_tailed(4, 400))
    coding = Compander("compander", 6, 0.5)
    levels = coding.fit(atoms).params["levels"]
    assert levels.shape == (4, 64) and bool((levels.diff() >= 0).all())
    assert bool((levels > 0).all()) and bool((levels[:, -1] <= atoms.scale()).all())
    for k in range(4):
        own = coding.fit(atoms.rows(torch.tensor([k]))).params["levels"]
        assert torch.equal(own[0], levels[k])


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_an_exponent_that_cannot_be_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match=r"coding\.alpha=.* from 0 .* to 1"):
        Compander("compander", 6, alpha)


# --- error by quantile ----------------------------------------------------------------------------

EDGES = (0.0, 0.5, 0.9, 0.99, 1.0)


def test_the_error_by_quantile_is_that_of_the_sorted_values() -> None:
    x = heavy_tailed(3, 1000, seed=5)
    atoms, coding = atoms_of(x), Las("las", 6, "zero")
    p = coding.fit(atoms).params
    found = error_by_quantile(coding, atoms, p, EDGES)
    assert found.share.shape == found.relative.shape == (3, 4)
    torch.testing.assert_close(found.share.sum(-1), torch.ones(3, dtype=torch.float64))
    for k in range(3):
        ranked = x[k].abs().double().sort().values
        step = ranked[-1] / 64
        squares = (ranked - step * (ranked / step).floor().clamp(max=63)) ** 2
        for b, (low, high) in enumerate(itertools.pairwise(EDGES)):
            part = slice(round(1000 * low), round(1000 * high))
            share = float(squares[part].sum() / squares.sum())
            relative = float(squares[part].sum() / ranked[part].square().sum())
            assert float(found.share[k, b]) == pytest.approx(share, rel=1e-4)
            assert float(found.relative[k, b]) == pytest.approx(relative, rel=1e-4)


def test_an_atom_across_an_edge_is_divided() -> None:
    """Half of the values are 1, half are 2; both become 1.5 by one level."""
    atoms = atoms_of(torch.tensor([[1.0, 2.0]]))
    p = {"levels": torch.tensor([[1.5]]), "thresholds": torch.empty(1, 0)}
    found = error_by_quantile(LloydMax("lloyd_max", 1), atoms, p, (0, 0.25, 0.75, 1))
    torch.testing.assert_close(found.share, torch.tensor([[0.25, 0.5, 0.25]]).double())
    torch.testing.assert_close(
        found.relative, torch.tensor([[0.25, 0.25 * 0.5 / 1.25, 0.0625]]).double()
    )


@pytest.mark.parametrize("name", TOPS)
def test_a_larger_exponent_moves_the_error_to_the_tail(name: str) -> None:
    atoms = known(name, 5000)
    shares = []
    for alpha in (0.0, THIRD, 0.6, 1.0):
        coding = Compander("compander", 6, alpha)
        found = error_by_quantile(coding, atoms, coding.fit(atoms).params, EDGES)
        shares.append(float(found.share[0, -1]))
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.01, abs=0.01) and shares[-1] > 0.5


@pytest.mark.parametrize("edges", [(0, 0.5), (0.1, 1), (0, 0.5, 0.5, 1), (0, 0.9, 0.5, 1), (1,)])
def test_edges_that_are_no_quantiles_are_refused(edges: tuple[float, ...]) -> None:
    atoms, coding = atoms_of(heavy_tailed(1, 20)), Las("las", 4, "zero")
    with pytest.raises(InputError, match="ascend from 0 to 1"):
        error_by_quantile(coding, atoms, coding.fit(atoms).params, edges)
