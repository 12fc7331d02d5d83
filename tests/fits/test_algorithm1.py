"""Algorithm 1: planted bases, what it keeps, what it considers, and its batching."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import site_params, squared_error
from stages.codings.multigrain import Multigrain
from stages.codings.phase import Phase
from stages.errors import InputError
from stages.fits import algorithm1
from stages.fits.algorithm1 import Algorithm1, Bases, allocations, fit_bases, loss_and_slopes
from stages.fitted import Fit
from stages.neurons.step import step_quantise
from tests.codings.reference import atoms_of, heavy_tailed, learning

SHORT = Algorithm1(rounds=3, neuron_steps=4, base_steps=5, neuron_lr=3e-3, base_lr=2e-3, slope=100)


# --- planted recovery -----------------------------------------------------------------------------
# The loss is zero at the planted bases and full of local minima around them: a step weight that is off
# by more than half of the last step gives other codes. At T=4 that is 5 % of a base, at T=6 1 %. So
# every grain starts from several bases, 1.5 % apart, and the surrogate is about as narrow as the last
# step (slope * 2^-T of a few units).

SCALE = 3.7
PARTS = {4: [(2, 2)], 6: [(2, 4), (3, 3), (4, 2)]}
STARTS = (1.93, 1.96, 1.99, 2.02, 2.05, 2.08)


def _plantings(timesteps: int, count: int = 20) -> list[tuple[tuple[float, ...], tuple[int, ...]]]:
    """Two bases drawn evenly from [1.92, 2.08] and an allocation, for every site."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        bases = (1.92 + 0.16 * torch.rand(2, generator=generator)).tolist()
        which = int(torch.randint(len(PARTS[timesteps]), (1,), generator=generator))
        found.append((tuple(bases), PARTS[timesteps][which]))
    return found


PLANTED = {timesteps: _plantings(timesteps) for timesteps in PARTS}


def _setting(timesteps: int, starts: tuple[float, ...] = STARTS) -> Algorithm1:
    return Algorithm1(10, 10, 10, 3e-3, 3e-3, slope=50.0 * 2 ** (timesteps - 4), starts=starts)


def planted_neuron(bases: tuple[float, ...], parts: tuple[int, ...]) -> dict[str, Tensor]:
    grain = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts))
    base = torch.tensor([bases])
    d, h, theta, v0 = Bases(base, base, base, True, grain[None]).steps()
    return {"scale": torch.tensor(SCALE), "d": d[0], "h": h[0], "theta": theta[0], "v0": v0[0]}


def generated(timesteps: int) -> Tensor:
    """What each planted neuron makes of 120 values spread evenly over its range, [sites, 120]."""
    generator = torch.Generator().manual_seed(0)
    x = SCALE * torch.rand(len(PLANTED[timesteps]), 120, generator=generator)
    return torch.stack(
        [
            step_quantise(own, planted_neuron(*planted))[0]
            for own, planted in zip(x, PLANTED[timesteps], strict=True)
        ]
    )


@functools.cache
def recovered(timesteps: int, starts: tuple[float, ...] = STARTS) -> list[Fit]:
    """The fit of every planted site."""
    x = generated(timesteps)
    atoms = atoms_of(x, torch.full((len(x),), SCALE, dtype=torch.float64))
    coding = Multigrain("multigrain", timesteps, 2, "half_step", False)
    fit = learning(coding, _setting(timesteps, starts)).fit(atoms)
    assert fit.curve is not None
    return [Fit(site_params(fit.params, k), fit.curve[k]) for k in range(len(x))]


def _hits(timesteps: int, fits: list[Fit]) -> int:
    """Sites whose output bases are all within 1 % of the planted ones."""
    offs = [
        float((fit.params["base_d"] / torch.tensor(bases) - 1).abs().max())
        for (bases, _), fit in zip(PLANTED[timesteps], fits, strict=True)
    ]
    return sum(off < 0.01 for off in offs)


@pytest.mark.parametrize("timesteps", [4, 6])
def test_planted_bases_are_recovered(timesteps: int) -> None:
    """Within 1 %, at every site; from base 2 alone most sites end in a local minimum."""
    assert _hits(timesteps, recovered(timesteps)) == len(PLANTED[timesteps])
    assert _hits(timesteps, recovered(timesteps, (2.0,))) < len(PLANTED[timesteps])


@pytest.mark.parametrize("timesteps", [4, 6])
def test_recovery_explains_the_data(timesteps: int) -> None:
    """The loss falls by orders of magnitude. h and theta show only through the values they lead to
    (near base 2 two codes can mean nearly the same value), so values are what is compared."""
    falls, agreements = [], []
    x = generated(timesteps)
    for own, fit in zip(x, recovered(timesteps), strict=True):
        falls.append(float(fit.curve[0] / fit.curve.min()))
        made = step_quantise(own, fit.params)[0]
        agreements.append(float(((made - own).abs() < 1e-3 * SCALE).float().mean()))
    assert sorted(falls)[len(falls) // 2] > 100
    assert sum(fall > 10 for fall in falls) >= 0.8 * len(falls)
    for fall, agreement in zip(falls, agreements, strict=True):
        assert fall < 1e4 or agreement > 0.95


# --- what is kept ---------------------------------------------------------------------------------


def relative_error(coding: Multigrain, atoms: Atoms, fit: Fit) -> Tensor:
    """Error of the returned neurons in units of the curve."""
    return squared_error(coding, atoms, fit.params) / atoms.maximum**2


def test_the_best_bases_are_kept_never_the_last() -> None:
    coding, atoms = Multigrain("multigrain", 5, 2, "zero", False), atoms_of(heavy_tailed(4, 400))
    wild = Algorithm1(rounds=3, neuron_steps=3, base_steps=3, neuron_lr=0.3, base_lr=0.3, slope=20)
    fit = learning(coding, wild).fit(atoms)
    assert fit.curve is not None and fit.curve.shape == (4, 3 * 6 + 1)
    assert bool((fit.curve[:, -1] > 1.2 * fit.curve.amin(-1)).all())  # the last are worse
    found = relative_error(coding, atoms, fit)
    torch.testing.assert_close(found, fit.curve.amin(-1).double(), rtol=1e-4, atol=0)


def test_the_curve_starts_at_binary_phase_coding() -> None:
    atoms = atoms_of(heavy_tailed(3, 400))
    for v0 in ("zero", "half_step"):
        fit = Multigrain("multigrain", 6, 2, v0, False, algorithm1=SHORT).fit(atoms)
        binary = Phase("phase", 6, 1, v0, True, algorithm1=SHORT).fit(atoms)
        assert fit.curve is not None and binary.curve is not None
        assert fit.curve.shape == (3, SHORT.rounds * 9 + 1)
        torch.testing.assert_close(fit.curve[:, 0], binary.curve[:, 0])
        assert bool((fit.curve.amin(-1) <= fit.curve[:, 0]).all())


class Fire(torch.autograd.Function):
    """Heaviside step forward, derivative of sigmoid(slope x) backward."""

    @staticmethod
    def forward(ctx, x: Tensor, slope: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.slope = slope
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        soft = torch.sigmoid(ctx.slope * x)
        return grad * ctx.slope * soft * (1 - soft), None


def loss(bases: Bases, u: Tensor, weight: Tensor, slope: float) -> Tensor:
    """What `loss_and_slopes` returns first, for autograd to derive."""
    d, h, theta, v0 = bases.steps()
    v = u + v0[:, None]
    y = torch.zeros_like(u)
    for t in range(d.shape[1]):
        spike = Fire.apply(v - theta[:, t, None], slope)
        v = v - spike * h[:, t, None]
        y = y + spike * d[:, t, None]
    return ((y - u) ** 2 * weight).sum(-1)


def test_bases_never_fall_below_their_bound() -> None:
    atoms = atoms_of(heavy_tailed(2, 200))
    wild = Algorithm1(rounds=2, neuron_steps=3, base_steps=3, neuron_lr=5.0, base_lr=5.0)
    bases = Bases.start(allocations(4, 2).expand(2, -1), torch.full((2, 2), 2.0), False, True)
    u = (atoms.value / atoms.maximum[:, None]).float()
    losses = functools.partial(
        loss_and_slopes, u, atoms.weight.float(), slope=wild.slopes(atoms.maximum)
    )
    algorithm1._descend(bases, losses, wild, Silent())
    lowest = [base.amin().item() for base in (bases.d, bases.h, bases.theta)]
    assert min(lowest) == pytest.approx(algorithm1.SMALLEST_BASE)  # it was reached, and held


class Silent:
    """Stands for a progress bar."""

    def update(self) -> None:
        pass


def test_each_turn_moves_its_own_bases_only() -> None:
    atoms = atoms_of(heavy_tailed(2, 200))
    only = {"rounds": 1, "neuron_lr": 0.01, "base_lr": 0.01}
    still = torch.full((2, 2), 2.0)
    coding = Multigrain("multigrain", 6, 2, "zero", False)
    turns = [Algorithm1(neuron_steps=n, base_steps=1 - n, **only) for n in (1, 0)]
    neuron, base = (learning(coding, turn).fit(atoms).params for turn in turns)
    assert torch.equal(neuron["base_d"], still)
    assert bool((neuron["base_h"] != 2).any())
    assert torch.equal(base["base_h"], still) and torch.equal(base["base_theta"], still)
    # One Adam step moves by the learning rate, whatever the gradient.
    assert float((base["base_d"] - 2).abs().max()) == pytest.approx(0.01, rel=1e-3)


# --- the neuron that is fitted is the neuron that runs --------------------------------------------


@pytest.mark.parametrize("half_step", [True, False])
def test_the_loss_is_the_error_of_the_running_neuron(half_step: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    grain = allocations(6, 2)
    d, h, theta = 2 + 0.1 * torch.randn(3, len(grain), 2, generator=generator)
    bases = Bases(d, h, theta, half_step, grain)
    u = torch.rand(len(grain), 500, generator=generator)
    weight = torch.rand(len(grain), 500, generator=generator)
    names = ("d", "h", "theta", "v0")
    p = dict(zip(names, bases.steps(), strict=True)) | {"scale": torch.ones(len(grain))}
    expected = ((step_quantise(u, p)[0] - u) ** 2 * weight).sum(-1)
    torch.testing.assert_close(loss(bases, u, weight, 10.0), expected)
    for a in range(len(grain)):  # weights of the steps, from the formula
        for t in range(6):
            assert float(p["d"][a, t]) == pytest.approx(float(d[a, grain[a, t]]) ** -(t + 1))
    last = p["d"][:, -1] / 2 if half_step else torch.zeros(len(grain))
    torch.testing.assert_close(p["v0"], last)


@pytest.mark.parametrize("half_step", [True, False])
def test_the_slopes_are_those_of_autograd(half_step: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    grain = allocations(6, 2)
    d, h, theta = 2 + 0.1 * torch.randn(3, len(grain), 2, generator=generator).double()
    bases = Bases(*(base.requires_grad_() for base in (d, h, theta)), half_step, grain)
    u, weight = torch.rand(2, len(grain), 500, generator=generator).double()
    steps = bases.steps()
    expected = loss(bases, u, weight, 10.0)
    leaves = [step for step in steps if step.requires_grad]
    slope = torch.full((len(grain),), 10.0).double()
    value, *slopes = loss_and_slopes(u, weight, *(step.detach() for step in steps), slope)
    torch.testing.assert_close(value, expected)
    by_bases = torch.autograd.grad(expected.sum(), [d, h, theta])
    chained = torch.autograd.grad(leaves, [d, h, theta], slopes[: len(leaves)])
    torch.testing.assert_close(chained, by_bases)


def test_the_surrogate_is_the_derivative_of_the_sigmoid() -> None:
    x = torch.linspace(-1, 1, 41, dtype=torch.float64, requires_grad=True)
    y = Fire.apply(x, 7.0)
    assert torch.equal(y.detach(), (x.detach() >= 0).double())
    (found,) = torch.autograd.grad(y.sum(), x)
    soft = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.sigmoid(7 * soft).sum(), soft)
    torch.testing.assert_close(found, expected)


def test_tied_stays_tied_and_decoupled_does_not() -> None:
    atoms = atoms_of(heavy_tailed(3, 300))
    for coding in (
        Multigrain("multigrain", 6, 2, "zero", True),
        Phase("phase", 6, 1, "zero", True),
    ):
        p = learning(coding, SHORT).fit(atoms).params
        for name in ("h", "theta"):
            assert torch.equal(p["d"], p[name])
            assert torch.equal(p["base_d"], p[f"base_{name}"])
        assert bool((p["base_d"] != 2).any())
    free = Multigrain("multigrain", 6, 2, "zero", False, algorithm1=SHORT).fit(atoms).params
    assert not torch.equal(free["base_d"], free["base_h"])
    assert not torch.equal(free["base_h"], free["base_theta"])


# --- allocations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timesteps", "grains", "rows"),
    [(6, 2, 3), (8, 2, 5), (10, 2, 7), (6, 3, 1), (8, 3, 6), (10, 3, 15), (6, 1, 1), (16, 4, 165)],
)
def test_allocations_are_all_compositions(timesteps: int, grains: int, rows: int) -> None:
    assert math.comb(timesteps - grains - 1, grains - 1) == rows
    found = allocations(timesteps, grains)
    assert found.shape == (rows, timesteps)
    parts = {tuple(row.bincount(minlength=grains).tolist()) for row in found}
    assert parts == {
        p for p in itertools.product(range(2, timesteps + 1), repeat=grains) if sum(p) == timesteps
    }
    assert bool((found.diff(dim=-1) >= 0).all())


def test_parts_of_one_step_are_the_fallback() -> None:
    assert allocations(3, 2).tolist() == [[0, 1, 1], [0, 0, 1]]
    assert allocations(2, 2).tolist() == [[0, 1]]
    assert len(allocations(5, 3)) == 6
    assert min(row.bincount().min() for row in allocations(4, 2)) == 2


@pytest.mark.parametrize(("timesteps", "grains"), [(1, 2), (2, 3), (6, 7)])
def test_more_grains_than_steps_are_refused(timesteps: int, grains: int) -> None:
    with pytest.raises(InputError, match=f"coding.grains={grains} with coding.timesteps"):
        allocations(timesteps, grains)


def test_every_allocation_is_fitted_and_the_best_taken() -> None:
    atoms = atoms_of(heavy_tailed(6, 300) ** 2)
    options = {"grains": 2, "tied": False, "half_step": True, "algorithm": SHORT}
    rows, scale = allocations(8, 2), atoms.maximum
    params, curve = fit_bases(atoms, rows, scale=scale, **options)
    alone = [fit_bases(atoms, row[None], scale=scale, **options) for row in rows]
    least = torch.stack([own.amin(-1) for _, own in alone])
    torch.testing.assert_close(curve.amin(-1), least.amin(0), rtol=1e-5, atol=0)
    choice = least.argmin(0)
    assert len(choice.unique()) > 1  # sites differ in their best allocation
    for k, a in enumerate(choice.tolist()):
        assert params["grain"][k].tolist() == rows[a].tolist()
        torch.testing.assert_close(params["base_d"][k], alone[a][0]["base_d"][k])


# --- batching -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 3 * 300, 1 << 21])
def test_a_batch_of_sites_is_the_sites_one_by_one(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algorithm1, "PROBLEMS_AT_ONCE", at_once)
    atoms = atoms_of(heavy_tailed(4, 300))
    coding = Multigrain("multigrain", 6, 2, "half_step", False)
    together = learning(coding, SHORT).fit(atoms)
    for k in range(4):
        alone = learning(coding, SHORT).fit(atoms.rows(torch.tensor([k])))
        for name, value in alone.params.items():
            torch.testing.assert_close(together.params[name][k : k + 1], value, rtol=1e-5, atol=0)
        assert together.curve is not None and alone.curve is not None
        torch.testing.assert_close(together.curve[k : k + 1], alone.curve, rtol=1e-4, atol=0)
    assert not torch.allclose(together.params["base_d"][0], together.params["base_d"][1])


def test_a_trained_coding_needs_its_settings() -> None:
    with pytest.raises(InputError, match="coding.algorithm1=None for multigrain"):
        Multigrain("multigrain", 6, 2, algorithm1=None)  # type: ignore[arg-type]
