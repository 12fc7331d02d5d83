"""The bound: against all partitions, the published Gaussian distortions, and every code it bounds."""

import itertools

import pytest
import torch
from scipy import stats

from stages.atoms import Atoms
from stages.codings.base import squared_error
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.codings.lloyd_max import LloydMax
from stages.codings.multigrain import Multigrain
from stages.codings.phase import Phase
from stages.fits import quantiser
from stages.fits.algorithm1 import Algorithm1
from stages.fits.quantiser import companded_cells, lloyd, optimal_cells
from tests.codings.reference import atoms_of, heavy_tailed, learning, shipped


def distortion(x: torch.Tensor, weight: torch.Tensor, levels: torch.Tensor) -> float:
    """Expected squared distance of one site's points to their nearest level."""
    nearest = (x[:, None] - levels).abs().amin(-1)
    return float((weight * nearest**2).sum())


def brute_force(x: torch.Tensor, weight: torch.Tensor, levels: int) -> float:
    """Least distortion over every partition of the points into consecutive cells."""
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(x)), levels - 1):
        edges = (0, *cuts, len(x))
        total = 0.0
        for a, b in itertools.pairwise(edges):
            w, v = weight[a:b], x[a:b]
            centre = (w * v).sum() / w.sum()
            total += float((w * (v - centre) ** 2).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_the_dynamic_programme_finds_the_best_partition(
    levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So many pieces that each point is one of its own; the first point, zero, weighs nothing.
    monkeypatch.setattr(quantiser, "PIECES_PER_LEVEL", 300 // levels)
    generator = torch.Generator().manual_seed(levels)
    x, weight = 0.1 + torch.rand(2, 4, 11, generator=generator, dtype=torch.float64)
    x = x.cumsum(-1)
    x[:, 0], weight[:, 0] = 0, 0
    found = optimal_cells(x, weight / weight.sum(-1, keepdim=True), levels)
    assert found.shape == (4, levels)
    for k in range(4):
        w = weight[k] / weight[k].sum()
        expected = brute_force(x[k, 1:], w[1:], levels)
        assert distortion(x[k], w, found[k]) == pytest.approx(expected, rel=1e-9, abs=1e-18)
        moved = found[k] * 1.05
        assert distortion(x[k], w, moved) > expected  # the comparison can fail


def half_normal(points: int = 20_000) -> Atoms:
    """The magnitudes of a unit Gaussian as atoms of equal probability."""
    quantile = torch.linspace(0, 1, points + 1, dtype=torch.float64)
    middle = ((quantile[1:] + quantile[:-1]) / 2).numpy()
    return atoms_of(torch.from_numpy(stats.halfnorm.ppf(middle))[None])


@pytest.mark.parametrize(
    ("timesteps", "published"),
    [(1, 0.1175), (2, 0.03454), (3, 0.009497), (4, 0.002499)],
)
def test_the_gaussian_distortions_of_max(timesteps: int, published: float) -> None:
    """Max 1960, table I: 4, 8, 16 and 32 output levels, of which half are magnitudes."""
    atoms = half_normal()
    coding = LloydMax("lloyd_max", timesteps)
    p = coding.fit(atoms).params
    assert p["levels"].shape == (1, 2**timesteps)
    assert float(squared_error(coding, atoms, p)) == pytest.approx(published, rel=0.02)


def test_the_first_gaussian_levels_of_max() -> None:
    p = LloydMax("lloyd_max", 1).fit(half_normal()).params
    torch.testing.assert_close(p["levels"], torch.tensor([[0.4528, 1.510]]), rtol=2e-3, atol=0)
    torch.testing.assert_close(p["thresholds"], torch.tensor([[0.9816]]), rtol=2e-3, atol=0)


def bounded(timesteps: int) -> list:
    """Every sign-magnitude code of at most 2^T magnitudes."""
    ungated = [c for c in shipped().values() if type(c) is not Gated]
    assert {type(c) for c in ungated} >= {Las, Phase, Multigrain}
    return [
        Las("las", timesteps, "zero"),
        Las("las_rounded", timesteps, "half_step"),
        Phase("phase", timesteps, 1, "half_step", True),
        *(Multigrain("multigrain", timesteps, n, "half_step", False) for n in (1, 2, 3)),
        Multigrain("multigrain", timesteps, min(2, timesteps), "zero", False),
        Gated("gated", timesteps, 1),
    ]


def sites() -> Atoms:
    """40 sites from nearly Gaussian to extreme tails, some with many zeros."""
    x = heavy_tailed(40, 1500, seed=3)
    tail = torch.linspace(0.4, 1.8, 40)[:, None]
    x = x.sign() * x.abs() ** tail
    x[::4, :400] = 0
    return atoms_of(x)


@pytest.mark.parametrize("timesteps", [4, 6, 8])
def test_lloyd_max_is_at_or_below_every_code_it_bounds(timesteps: int) -> None:
    atoms = sites()
    bound = LloydMax("lloyd_max", timesteps)
    least = squared_error(bound, atoms, bound.fit(atoms).params)
    algorithm = Algorithm1(rounds=1, neuron_steps=8, base_steps=8, neuron_lr=3e-3, base_lr=3e-3)
    for coding in bounded(timesteps):
        error = squared_error(coding, atoms, learning(coding, algorithm).fit(atoms).params)
        assert bool((least <= error).all()), coding
    gated = Gated("gated", timesteps, 3)  # 3 * 2^T magnitudes: the bound does not hold for it
    beyond = squared_error(gated, atoms, gated.fit(atoms).params)
    assert bool((beyond < least).any())


def test_lloyd_never_raises_the_error() -> None:
    x = heavy_tailed(3, 2000).abs().double().sort(-1).values
    weight = torch.full_like(x, 1 / 2000)
    levels = companded_cells(x, weight, 16)
    errors = []
    for iterations in (0, 1, 5, 50):
        after = lloyd(x, weight, levels, iterations)
        errors.append([distortion(x[k], weight[k], after[k]) for k in range(3)])
    for worse, better in itertools.pairwise(errors):
        assert all(b <= a * (1 + 1e-12) for a, b in zip(worse, better, strict=True))
    assert all(last < first for first, last in zip(errors[0], errors[-1], strict=True))


def test_it_is_a_quantiser_to_the_nearest_level_and_no_neuron() -> None:
    coding, atoms = LloydMax("lloyd_max", 3), atoms_of(heavy_tailed(2, 500))
    p = {name: value.float() for name, value in coding.fit(atoms).params.items()}
    x = heavy_tailed(2, 400, seed=9)
    value, spikes = coding.quantise(x, p)
    for k in range(2):
        nearest = (x[k].abs()[:, None] - p["levels"][k]).abs().argmin(-1)
        torch.testing.assert_close(value[k], x[k].sign() * p["levels"][k][nearest])
        own, _ = coding.quantise(x[k], {name: tensor[k] for name, tensor in p.items()})
        assert torch.equal(own, value[k])
    assert spikes.isnan().all()
    assert float(coding.quantise(torch.zeros(1), {n: t[0] for n, t in p.items()})[0]) == 0
    assert not coding.neuron
    with pytest.raises(NotImplementedError, match="bound"):
        coding.encode(x, p)


@pytest.mark.parametrize("timesteps", [1, 3])
def test_an_outlier_beyond_a_gap_gets_a_level_of_its_own(timesteps: int) -> None:
    """A thousand values up to 1 and one of 100: sharing its cell with others costs about 5."""
    x = torch.cat([torch.linspace(0.001, 1, 1000), torch.tensor([100.0])])
    coding, atoms = LloydMax("lloyd_max", timesteps), atoms_of(x[None])
    p = coding.fit(atoms).params
    body = 2**timesteps - 1  # levels left for the uniform part
    assert float(p["levels"].max()) == 100
    expected = 1000 / 1001 / (12 * body**2)
    assert float(squared_error(coding, atoms, p)) == pytest.approx(expected, rel=0.01)
