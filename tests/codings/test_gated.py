"""The search for ranges against brute force, numeric integration and random search."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import error_and_spikes, squared_error
from stages.codings.gated import Gated
from stages.errors import InputError
from stages.fits import range_search
from stages.fits.range_search import _costs, _search, nested_ranges, rounding_error
from tests.codings.reference import atoms_of, heavy_tailed


def test_rounding_error_is_the_integral() -> None:
    cases = [
        (m, s) for m in (0.0, 0.2, 0.5, 3.49, 7.51, 100.3) for s in (0.01, 0.2, 0.29, 1.7, 9.1)
    ]
    for mean, spread in cases:
        half = spread * 3**0.5
        kinks = np.arange(np.floor(mean - half), np.ceil(mean + half) + 1, 0.5)
        kinks = kinks[(kinks > mean - half) & (kinks < mean + half)]
        edges = [mean - half, *kinks, mean + half]
        total = sum(
            integrate.quad(lambda z: (z - np.round(z)) ** 2, a, b)[0]
            for a, b in itertools.pairwise(edges)
        )
        found = rounding_error(*torch.tensor([mean, spread], dtype=torch.float64))
        assert float(found) == pytest.approx(total / (2 * half), rel=1e-6)


@pytest.mark.parametrize("spread", [0.0, 1e-5, 2e-4])
def test_rounding_error_of_a_narrow_atom(spread: float) -> None:
    """The branch for narrow atoms equals the integral where no boundary lies inside the atom."""
    mean = torch.tensor([0.1, 2.4, 5.75], dtype=torch.float64)
    expected = (mean - mean.round()) ** 2 + spread**2
    torch.testing.assert_close(rounding_error(mean, torch.full_like(mean, spread)), expected)


def tiny(sites: int, atoms: int, spread: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    value = heavy_tailed(sites, atoms, seed).abs().double().sort(-1).values
    weight = torch.rand(sites, atoms, generator=generator, dtype=torch.float64)
    return value, spread * value, weight / weight.sum(-1, keepdim=True)


def cost(
    value: Tensor, spread: Tensor, weight: Tensor, scales: tuple[float, ...], timesteps: int
) -> float:
    """Expected squared error of one site's gate and ranges, from the definition of the coding.

    An atom is 4000 points spread evenly; its mean decides which neuron it enters.
    """
    points = (2 * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 - 1) * 3**0.5
    total = 0.0
    for x, s, w in zip(value, spread, weight, strict=True):
        inside = [tau for tau in scales if x < tau * (1 - 2.0 ** -(timesteps + 1))]
        step = (inside[0] if inside else scales[-1]) * 2.0**-timesteps
        z = x + s * points
        level = torch.floor(z / step + 0.5) if inside else 2**timesteps - 1
        total += float(w * (z - level * step).square().mean())
    return total


@pytest.mark.parametrize("grains", [1, 2, 3])
@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_the_search_is_exact_over_its_candidates(grains: int, spread: float) -> None:
    timesteps = 3
    value, width, weight = tiny(3, 12, spread, seed=4)
    octaves = torch.linspace(-4, 0.2, 9, dtype=torch.float64)
    candidates = value[:, -1:] * 2.0**octaves
    found = _search(value, width, weight, candidates, [timesteps] * grains)
    for k in range(3):
        site = value[k], width[k], weight[k]
        choices = itertools.combinations_with_replacement(candidates[k].tolist(), grains)
        costs = {scales: cost(*site, scales, timesteps) for scales in choices}
        best = min(costs.values())
        assert costs[tuple(found[k].tolist())] == pytest.approx(best, rel=1e-6)
        assert sorted(costs.values())[1] > 0  # the choice matters
        assert max(costs.values()) > 3 * best


@pytest.mark.parametrize(
    "wrong",
    [
        lambda mean, spread: (mean - mean.floor()) ** 2,  # floors instead of rounding
        lambda mean, spread: torch.zeros_like(mean),  # sees saturation only
    ],
)
def test_the_comparison_fails_on_a_search_with_a_wrong_cost(
    wrong: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    value, width, weight = tiny(3, 12, 0.0, seed=4)
    candidates = value[:, -1:] * 2.0 ** torch.linspace(-4, 0.2, 9, dtype=torch.float64)

    def found() -> list[float]:
        scales = _search(value, width, weight, candidates, [3, 3])
        return [cost(value[k], width[k], weight[k], tuple(scales[k].tolist()), 3) for k in range(3)]

    right = found()
    monkeypatch.setattr(range_search, "rounding_error", wrong)
    assert max(b / a for a, b in zip(right, found(), strict=True)) > 1.01


@pytest.mark.parametrize("timesteps", [4, 6, 8])
def test_more_ranges_are_never_worse(timesteps: int) -> None:
    atoms = atoms_of(heavy_tailed(8, 1500))
    errors = []
    for grains in (1, 2, 3):
        coding = Gated("gated", timesteps, grains)
        p = coding.fit(atoms).params
        assert bool((p["scale"].diff(dim=-1) >= 0).all())
        errors.append(squared_error(coding, atoms, p))
    assert bool((errors[1] < errors[0]).all()) and bool((errors[2] < errors[1]).all())
    assert bool((errors[1] < errors[0] / 4).all())  # heavy tails: a second range is worth a lot


@pytest.mark.parametrize("grains", [1, 2, 3])
def test_the_fit_beats_a_random_search(grains: int) -> None:
    timesteps = 5
    atoms = atoms_of(heavy_tailed(4, 1000))
    coding = Gated("gated", timesteps, grains)
    error = squared_error(coding, atoms, coding.fit(atoms).params)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        octaves = 8 * torch.rand(4, grains, generator=generator, dtype=torch.float64) - 7.8
        guess = (atoms.maximum[:, None] * 2.0**octaves).sort(-1).values
        assert bool((squared_error(coding, atoms, {"scale": guess}) > 0.995 * error).all())


def test_the_error_the_search_expects_is_the_error_of_samples() -> None:
    timesteps, grains = 5, 3
    value = heavy_tailed(2, 1000).abs().double().sort(-1).values
    spread = 0.002 * value  # like bins of seven mantissa bits: few straddle a limit
    atoms = Atoms(value, spread, torch.full_like(value, 1 / 1000), value[:, -1])
    scale = nested_ranges(value, spread, atoms.weight, [timesteps] * grains)
    below, beyond = _costs(value, spread, atoms.weight, scale, timesteps)
    expected = below[:, 0, 0] + beyond[:, -1]
    for k in range(1, grains):
        expected += below[:, k, k] - below[:, k, k - 1]
    generator = torch.Generator().manual_seed(1)
    inside = 2 * torch.rand(2, 1000, 500, generator=generator, dtype=torch.float64) - 1
    x = (value[..., None] + spread[..., None] * 3**0.5 * inside).flatten(1)
    coded, _ = Gated("gated", timesteps, grains).quantise(x.float(), {"scale": scale.float()})
    measured = (coded.double() - x).square().mean(-1)
    torch.testing.assert_close(measured, expected, rtol=0.02, atol=0)


def test_sites_are_fitted_alone() -> None:
    atoms = atoms_of(heavy_tailed(20, 300))  # more sites than are searched at once
    together = Gated("gated", 4, 2).fit(atoms).params["scale"]
    for k in (0, 15, 16, 19):
        alone = Gated("gated", 4, 2).fit(atoms.rows(torch.tensor([k])))
        torch.testing.assert_close(together[k : k + 1], alone.params["scale"], rtol=1e-12, atol=0)
    assert not torch.allclose(together[0], together[1])


# --- offset, unequal steps, spikes in the objective ------------------------------------------------


def test_an_offset_makes_every_level_count() -> None:
    """All n 2^T levels differ, and the error falls where nested ranges repeat theirs."""
    atoms = atoms_of(heavy_tailed(6, 1500))
    nested, offset = Gated("gated", 4, 3), Gated("gated", 4, 3, offset=True)
    p = offset.fit(atoms).params
    assert all(len(levels.unique()) == 3 * 2**4 for levels in offset.table(p))
    ratio = squared_error(offset, atoms, p) / squared_error(nested, atoms, nested.fit(atoms).params)
    assert bool((ratio < 0.95).all())


def test_the_search_with_an_offset_beats_a_random_search() -> None:
    atoms = atoms_of(heavy_tailed(4, 1000))
    coding = Gated("gated", 5, 2, offset=True)
    error = squared_error(coding, atoms, coding.fit(atoms).params)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        octaves = 8 * torch.rand(4, 2, generator=generator, dtype=torch.float64) - 7.8
        scale = (atoms.maximum[:, None] * 2.0**octaves).sort(-1).values
        guess = {"scale": scale, "floor": torch.nn.functional.pad(scale[:, :-1], (1, 0))}
        assert bool((squared_error(coding, atoms, guess) > 0.98 * error).all())


def test_steps_may_differ_between_grains() -> None:
    """One step more for the outer range costs nothing on values that stay inside the inner one."""
    atoms = atoms_of(heavy_tailed(6, 1500))
    plain, longer = Gated("gated", 4, 2), Gated("gated", 4, 2, grain_steps=(0, 1))
    p = longer.fit(atoms).params
    assert p["steps"].unique(dim=0).tolist() == [[16.0, 32.0]]
    least = squared_error(plain, atoms, plain.fit(atoms).params)
    assert bool((squared_error(longer, atoms, p) < least).all())
    finest = Gated("gated", 5, 2)
    bound = squared_error(finest, atoms, finest.fit(atoms).params)
    assert bool((squared_error(longer, atoms, p) > bound).all())


@pytest.mark.parametrize("offset", [False, True])
def test_a_price_on_spikes_draws_the_frontier(offset: bool) -> None:
    atoms = atoms_of(heavy_tailed(6, 1500))
    points = []
    for mu in (0.0, 1e-4, 1e-3, 1e-2):
        coding = Gated("gated", 5, 2, offset=offset, mu=mu)
        points.append(error_and_spikes(coding, atoms, coding.fit(atoms).params))
    for (less, more), (error, fewer) in itertools.pairwise(points):
        assert bool((error >= less * (1 - 1e-3)).all())
        assert bool((fewer <= more * (1 + 1e-3)).all())
    assert bool((points[-1][1] < 0.8 * points[0][1]).all())


@pytest.mark.parametrize(
    "options",
    [
        {"grain_steps": (0,)},
        {"grain_steps": (-4, 0)},
        {"mu": -1.0},
        {"allocation": "some"},
        {"budget": "joules"},
        {"allocation": "budget"},
    ],
)
def test_what_gated_cannot_be_is_refused(options: dict) -> None:
    with pytest.raises(InputError):
        Gated("gated", 4, 2, **options)


@pytest.mark.parametrize("mu", [-1.0, float("nan"), float("inf"), None, True, "foo"])
def test_a_price_is_a_finite_number(mu: object) -> None:
    with pytest.raises(
        InputError, match=r"coding\.mu=.* for gated: give a finite number, 0 or more"
    ):
        Gated(mu=mu)  # type: ignore[arg-type]
