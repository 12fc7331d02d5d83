"""Timesteps under a budget against exhaustive search."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import error_and_spikes
from stages.codings.gated import Gated
from stages.fits.allocation import cheapest
from stages.fits.sensitivity import CELLS, Sensitivity, predicted_loss
from tests.codings.reference import atoms_of, heavy_tailed

SENSITIVITY = Sensitivity("sensitivity", 1, 0)


def observed(sites: int = 5) -> Atoms:
    """Sites whose errors matter by factors of 30 apart, and that feed unequal fan-outs."""
    statistic = {
        "total": torch.full((sites, CELLS), 1.0, dtype=torch.float64)
        * 30.0 ** torch.arange(sites)[:, None],
        "count": torch.full((sites, CELLS), 100.0, dtype=torch.float64),
        "macs": torch.arange(1.0, sites + 1, dtype=torch.float64),
        "tokens": torch.full((sites,), 10.0, dtype=torch.float64),
    }
    return replace(atoms_of(heavy_tailed(sites, 400)), statistics={"sensitivity": statistic})


def test_no_choice_within_the_budget_costs_less() -> None:
    """Convex losses: the price finds the optimum that trying all 5^4 choices finds."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(4, 1, generator=generator, dtype=torch.float64) * 100
    loss = scale * 4.0 ** -torch.arange(5)
    cost = torch.arange(5.0, dtype=torch.float64).expand(4, 5)
    allowed = 9.0

    def total(choice: tuple[int, ...], what: Tensor) -> float:
        return sum(float(row[c]) for row, c in zip(what, choice, strict=True))

    every = itertools.product(range(5), repeat=4)
    least = min(total(c, loss) for c in every if total(c, cost) <= allowed)
    found = tuple(cheapest(loss, cost, allowed).tolist())
    assert total(found, cost) <= allowed
    assert total(found, loss) == pytest.approx(least)


@pytest.mark.parametrize("budget", ["timesteps", "spikes"])
def test_the_budget_is_kept_and_the_predicted_loss_falls(budget: str) -> None:
    atoms = observed()
    statistic = atoms.statistics["sensitivity"]
    uniform = Gated("gated", 5, 2, sensitivity=SENSITIVITY)
    coding = replace(uniform, allocation="budget", budget=budget)
    p, even = coding.fit(atoms).params, uniform.fit(atoms).params
    loss = predicted_loss(coding.quantise, atoms, p, statistic).sum()
    assert float(loss) < 0.6 * float(predicted_loss(uniform.quantise, atoms, even, statistic).sum())
    steps = p["steps"][:, 0].log2()
    assert len(steps.unique()) > 1
    if budget == "timesteps":
        assert float(steps.mean()) <= 5
        assert bool((steps.diff() >= 0).all())  # what matters more gets no fewer steps
    else:
        spent, allowed = (
            float((error_and_spikes(c, atoms, q)[1] * statistic["macs"]).sum())
            for c, q in ((coding, p), (uniform, even))
        )
        assert 0.9 * allowed < spent <= allowed * (1 + 1e-6)


def test_a_price_takes_the_least_of_loss_and_spikes() -> None:
    """A dearer spike gives fewer of them and more predicted loss; no other T of a site is cheaper."""
    atoms = observed()
    statistic = atoms.statistics["sensitivity"]
    share = statistic["macs"] / statistic["macs"].sum()
    points = []
    for mu in (0.01, 1.0, 100.0):
        coding = Gated("gated", 5, 2, mu=mu, sensitivity=SENSITIVITY, allocation="price")
        p = coding.fit(atoms).params
        loss = predicted_loss(coding.quantise, atoms, p, statistic)
        spikes = error_and_spikes(coding, atoms, p)[1] * share
        points.append((float(loss.sum()), float(spikes.sum())))
        for timesteps in (3, 4, 5, 6, 7):
            other = coding.fit_at(atoms, timesteps)
            rival = predicted_loss(coding.quantise, atoms, other, statistic)
            rival = rival + mu * error_and_spikes(coding, atoms, other)[1] * share
            assert bool((loss + mu * spikes <= rival * (1 + 1e-9)).all())
    for (loss, spikes), (more, fewer) in itertools.pairwise(points):
        assert more > loss and fewer < spikes


def test_a_site_that_matters_nothing_gets_the_fewest_steps() -> None:
    atoms = observed()
    atoms.statistics["sensitivity"]["total"][2] = 0
    coding = Gated("gated", 5, 2, sensitivity=SENSITIVITY, allocation="budget")
    steps = coding.fit(atoms).params["steps"][:, 0].log2()
    assert float(steps[2]) == 3
