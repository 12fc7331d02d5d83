"""Levels of a time code: the dynamic programme and the silent zone against all choices, λ*, prices."""

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import error_and_spikes
from stages.codings.timed import Timed
from stages.fits import time_levels
from stages.fits.free_levels import freed
from stages.fits.time_levels import Levels, Points, cheapest_levels, silenced, total_cost
from tests.codings.reference import atoms_of, heavy_tailed

POINTS = 20_000
# Densities of magnitudes, and (∫ p^(1/3))^3 / 12 of each: times K^-2 the least error of K levels
# (Panter & Dite 1951).
LAPLACE, GAUSS = stats.expon(), stats.halfnorm()
HEAVY = stats.lognorm(1.2)  # kurtosis in the thousands, of a sample in the hundreds
SMOOTH = [
    (LAPLACE, 27 / 12),
    (GAUSS, math.sqrt(2 / math.pi) * (3 * math.pi / 2) ** 1.5 / 12),
]
names = ["laplace", "gauss"]


def quantiles(density: Any) -> Tensor:
    """Magnitudes of equal probability, [1, POINTS]."""
    middle = (torch.arange(POINTS).double() + 0.5) / POINTS
    return torch.as_tensor(density.ppf(middle.numpy()))[None]


def smooth(density: Any) -> Atoms:
    """A density in cells, even ones or of even cube roots, its tail beyond 1e-12 cut off."""
    place = torch.linspace(0, 1, POINTS + 1, dtype=torch.float64)[None]
    edges = place ** (3 if density is HEAVY else 1) * density.isf(1e-12)
    mass = torch.as_tensor(density.cdf(edges.numpy())).diff()
    atoms = atoms_of((edges[:, 1:] + edges[:, :-1]) / 2)
    spread = edges.diff() / math.sqrt(12)
    return replace(atoms, weight=mass / mass.sum(), spread=spread)


def points_of(seed: int, size: int, spike: float, coherent: float, signs: float = 0.0) -> Points:
    """One site of random values, zero among them, of which `signs` say how much of one sign."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(1, size, generator=draw, dtype=torch.float64).sort(-1).values ** 2
    x[:, :2] = 0
    mass, weight = torch.rand(2, 1, size, generator=draw, dtype=torch.float64)
    variance = 0.001 * torch.rand(1, size, generator=draw, dtype=torch.float64)
    sign = (signs + torch.rand(1, size, generator=draw, dtype=torch.float64)).clamp(max=1)
    prices = torch.tensor([[spike], [coherent]]).double()
    return Points(x, variance, weight, mass / mass.sum(), sign, *prices)


# --- the searches against all choices -------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_states_that_never_fall_are_the_cheapest_of_all(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    cost = torch.rand(3, 5, 4, generator=draw, dtype=torch.float64)
    states = time_levels._rising(cost)
    every = itertools.combinations_with_replacement(range(4), 5)  # ascending by themselves
    paths = torch.tensor(list(every))
    for k in range(3):
        costs = cost[k, torch.arange(5), paths].sum(-1)
        assert states[k].tolist() == paths[costs.argmin()].tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("spike", "coherent"), [(0.0, 0.0), (0.05, 0.0), (0.02, 3.0), (9.0, 0.0)])
def test_the_silent_zone_is_the_best_of_all_cuts(seed: int, spike: float, coherent: float) -> None:
    """Value by value: silent below the cut, else the nearest level; the mean error counts again."""
    points = points_of(seed, 12, spike, coherent, signs=0.3)
    level = torch.tensor([0.05, 0.1, 0.2, 0.4, 0.8]).double()
    number = torch.tensor([5])
    made = silenced(points, level[:1], level[None], number)
    x, rows = points.x[0].tolist(), range(12)
    costs = {}
    for cut in range(13):
        error = mean = spikes = 0.0
        for i in rows:
            value = min(level.tolist(), key=lambda v, i=i: abs(v - x[i])) if i >= cut else 0.0
            error += float(points.weight[0, i]) * (
                (value - x[i]) ** 2 + float(points.variance[0, i])
            )
            mean += float(points.mass[0, i] * points.sign[0, i]) * (value - x[i])
            spikes += float(points.mass[0, i]) * (i >= cut)
        costs[cut] = (error + coherent * mean**2 + spike * spikes, spikes)
    best = min(costs[cut][0] for cut in range(2, 13))  # the two zeros never spike
    assert float(made.error + points.spike * made.spikes) == pytest.approx(best)
    cut = sum(each < float(made.end) for each in x)
    assert costs[cut] == pytest.approx((best, float(made.spikes)))
    inside = sum((a + b) / 2 <= float(made.end) for a, b in itertools.pairwise(level.tolist()))
    assert int(made.used) == 5 - inside


def test_the_cost_is_that_of_the_neuron() -> None:
    """What the search counts is what the coding does: errors, spikes, and the levels that are left."""
    for levels, mu in itertools.product(("shifts", "free"), (0.0, 0.05)):
        coding = Timed(timesteps=32, mu=mu, levels=levels)
        atoms = atoms_of(heavy_tailed(3, 2000))
        p = {name: value.float() for name, value in coding.fit(atoms).params.items()}
        error, spikes = error_and_spikes(coding, atoms, p)
        costs = coding.decoding(p)
        number = costs.macs if levels == "free" else costs.acs
        # A third of all multiplications each, and a hundredth as many accumulators.
        level = {"shifts": 1 + 2 * 4.6 / 0.9 / 32, "free": 4.6 / 0.9}[levels] / 300
        expected = error / atoms.power() + mu * spikes / 3 + mu * level * number
        assert coding.cost(atoms).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_levels_tried_together_are_those_tried_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    points, slot = Timed(timesteps=16, mu=0.05).objective(atoms_of(heavy_tailed(3, 64)))
    signs = torch.tensor([[0.0], [0.7], [1.0]]).double()  # two of them are searched for mean errors
    points = replace(points, sign=signs.expand_as(points.x))
    together = cheapest_levels(points, slot, 16)
    monkeypatch.setattr(time_levels, "AT_ONCE", 1)
    for one, other in zip(
        vars(together).values(), vars(cheapest_levels(points, slot, 16)).values(), strict=True
    ):
        assert one.tolist() == other.tolist()


@functools.cache
def best(density: Any, number: int, levels: str) -> tuple[float, Tensor]:
    """Squared error of at most so many levels of a smooth density, and these, zero among them."""
    atoms, coding = smooth(density), Timed(timesteps=number, levels=levels)
    p = coding.fit(atoms).params
    return float(error_and_spikes(coding, atoms, p)[0]), coding.table(p)[0].unique()


# --- λ* -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "constant"), SMOOTH, ids=names)
@pytest.mark.parametrize("number", [64, 128, 256])
def test_levels_of_a_smooth_density_lose_a_tenth_more_than_the_optimal_ones(
    density: Any, constant: float, number: int
) -> None:
    """Gaps that are powers of two differ from the best ones by up to sqrt(2)."""
    for levels, most in (("shifts", 1.13), ("free", 1.08)):
        error, _ = best(density, number, levels)
        assert 0.98 < error / (constant / number**2) < most


@pytest.mark.parametrize(("density", "constant"), SMOOTH, ids=names)
@pytest.mark.parametrize("levels", ["shifts", "free"])
def test_their_density_is_that_of_bennett(density: Any, constant: float, levels: str) -> None:
    """A part of the mass of λ* ∝ p^(1/3) holds the same part of 256 levels."""
    _, table = best(density, 256, levels)
    wider = {LAPLACE: stats.expon(scale=3), GAUSS: stats.halfnorm(scale=math.sqrt(3))}[density]
    share = torch.as_tensor(wider.cdf(table.numpy()))  # p^(1/3) of both is of their kind
    even = (torch.arange(len(table)).double() + 0.5) / len(table)
    assert float((share - even).abs().max()) < (0.04 if levels == "free" else 0.06)


@pytest.mark.parametrize("density", [LAPLACE, GAUSS, HEAVY], ids=[*names, "heavy"])
@pytest.mark.parametrize("number", [16, 32, 64, 128, 256])
def test_what_powers_of_two_lose_against_free_levels(density: Any, number: int) -> None:
    """In dB of squared error at the same number of levels."""
    (shifts, table), (free, others) = (best(density, number, of) for of in ("shifts", "free"))
    assert 0.95 * number < len(table) - 1 == len(others) - 1 <= number
    loss = 10 * math.log10(shifts / free)
    assert 0.15 < loss < 0.55


@pytest.mark.parametrize("spike", [0.0, 0.03])
def test_free_levels_are_centroids_and_halfway(spike: float) -> None:
    points, slot = Timed(timesteps=16, mu=spike).objective(atoms_of(heavy_tailed(2, 3000)))
    shifts = cheapest_levels(points, slot, 16)
    free = freed(points, slot, shifts)
    assert bool((total_cost(points, slot, free) <= total_cost(points, slot, shifts)).all())
    for k in range(2):
        level = free.table[k, : int(free.number[k])]
        x, weight = points.x[k], points.weight[k]
        nearest = (x[:, None] - level).abs().argmin(-1)
        for number in nearest[x >= free.end[k]].unique():
            cell = (nearest == number) & (x >= free.end[k])
            mean = float((weight * x)[cell].sum() / weight[cell].sum())
            assert float(level[number]) == pytest.approx(mean, rel=0.02)


# --- prices ---------------------------------------------------------------------------------------


def fitted(mu: float, nu: float = 0.0, levels: str = "shifts") -> tuple[Tensor, Tensor, Tensor]:
    """Error, spikes and levels of three heavy-tailed sites."""
    coding, atoms = (
        Timed(timesteps=64, mu=mu, nu=nu, levels=levels),
        atoms_of(heavy_tailed(3, 3000)),
    )
    p = coding.fit(atoms).params
    error, spikes = error_and_spikes(coding, atoms, p)
    return error, spikes, coding.table(p).diff(dim=-1).gt(0).sum(-1)


@pytest.mark.parametrize("levels", ["shifts", "free"])
def test_a_higher_price_never_gives_more_spikes(levels: str) -> None:
    runs = [fitted(mu, levels=levels) for mu in (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)]
    for cheap, dear in itertools.pairwise(runs):
        assert bool((dear[1] <= cheap[1]).all()) and bool((dear[0] > 0.9 * cheap[0]).all())
    assert float(runs[0][1].min()) > 0.85 and float(runs[-1][1].max()) < 0.3


def test_a_price_of_levels_leaves_fewer() -> None:
    counts = [fitted(0.0, nu)[2] for nu in (0.0, 1e-4, 1e-3, 1e-2)]
    for more, fewer in itertools.pairwise(counts):
        assert bool((fewer < more).all())


def lost(coherent: float, levels: str) -> float:
    """The part of the sum of positive values that their codes lack, which mostly are small."""
    x = quantiles(HEAVY)
    atoms = replace(atoms_of(x), negative=torch.zeros_like(x))
    size = {"macs": torch.ones(1).double(), "accumulators": torch.ones(1).double() / coherent}
    atoms = replace(atoms, statistics={"products": size})
    coding = Timed(timesteps=32, mu=0.05, levels=levels)
    p = {name: value[0].float() for name, value in coding.fit(atoms).params.items()}
    value, _ = coding.quantise(x[0].float(), p)
    return float(1 - value.double().sum() / x.sum())


@pytest.mark.parametrize("levels", ["shifts", "free"])
def test_one_sided_values_of_wide_products_lose_less_of_their_sum(levels: str) -> None:
    narrow, wide, wider = (lost(width, levels) for width in (1.0, 100.0, 10_000.0))
    assert abs(narrow) > 3 * abs(wide) and abs(wide) >= abs(wider)
    assert abs(wider) < 0.003


def test_better_levels_are_taken_site_by_site() -> None:
    points = Points(*(torch.cat([t, t]) for t in vars(points_of(0, 12, 0.0, 0.0)).values()))
    slot = torch.zeros(2).double()

    def with_errors(*errors: float) -> Levels:
        row = torch.tensor(errors).double()
        return Levels(row, row[:, None], row.long(), row, row.long(), row, row)

    old, new = with_errors(1.0, 4.0), with_errors(2.0, 3.0)
    kept = time_levels.better(points, slot, old, torch.arange(2), new)
    assert kept.error.tolist() == [1, 3] == kept.table[:, 0].tolist()
