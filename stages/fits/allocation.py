"""Timesteps for every site under a budget: where a step buys the most predicted loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.codings.base import MAX_TIMESTEPS, error_and_spikes
from stages.statistics.sensitivity import predicted_loss

if TYPE_CHECKING:
    from stages.codings.gated import Gated
    from stages.distribution import Atoms

ALLOCATIONS = ("uniform", "budget", "price")
BUDGETS = ("timesteps", "spikes")
REACH = (-2, -1, 0, 1, 2)  # how far a site's T may lie from the mean
HALVINGS = 60


def allocate(coding: Gated, atoms: Atoms) -> dict[str, Tensor]:
    """Parameters of all sites, each at the T that the budget or the price of a spike gives it.

    Least sum over sites of predicted loss + price * cost, where the cost of a site is its T or its
    spikes weighted by fan-out, at the smallest price that keeps within the budget (Shoham & Gersho
    1988, bit allocation for an arbitrary set of quantisers).
    """
    lowest = max(1, 1 - min(coding.steps(0)))
    highest = MAX_TIMESTEPS - max(coding.steps(0))
    choices = [t for r in REACH if lowest <= (t := coding.timesteps + r) <= highest]
    fits = [coding.fit_at(atoms, t) for t in choices]
    assert coding.sensitivity is not None
    statistic = atoms.statistics[coding.sensitivity.name]
    loss = torch.stack([predicted_loss(coding, atoms, p, statistic) for p in fits], -1)
    if coding.allocation == "budget" and coding.budget == "timesteps":
        cost = torch.tensor(choices, dtype=torch.float64).expand_as(loss)
    else:
        spikes = torch.stack([error_and_spikes(coding, atoms, p)[1] for p in fits], -1)
        cost = spikes * statistic["macs"][:, None] / statistic["macs"].sum()
    if coding.allocation == "price":
        return _picked(fits, (loss + coding.mu * cost).argmin(-1))
    allowed = float(cost[:, choices.index(coding.timesteps)].sum())
    return _picked(fits, _cheapest(loss, cost, allowed))


def _picked(fits: list[dict[str, Tensor]], index: Tensor) -> dict[str, Tensor]:
    """Every site's parameters out of the fit that `index` [sites] names."""
    stacked = {name: torch.stack([p[name] for p in fits], 1) for name in fits[0]}
    rows = torch.arange(len(index))
    return {name: t[rows, index] for name, t in stacked.items()}


def _cheapest(loss: Tensor, cost: Tensor, allowed: float) -> Tensor:
    """The choice of every site, loss and cost [sites, choices] -> [sites]: within `allowed`."""

    def choose(price: float) -> Tensor:
        return (loss + price * cost).argmin(-1, keepdim=True)

    low, high = 0.0, 1.0
    while float(cost.gather(-1, choose(high)).sum()) > allowed:
        high *= 4
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        within = float(cost.gather(-1, choose(middle)).sum()) <= allowed
        low, high = (low, middle) if within else (middle, high)
    index = choose(high)
    return _spend(loss, cost, index, allowed).squeeze(-1)


def _spend(loss: Tensor, cost: Tensor, index: Tensor, allowed: float) -> Tensor:
    """Spends what the last price left over, one step of one site at a time, best first."""
    last = loss.shape[1] - 1
    while True:
        up = (index + 1).clamp(max=last)
        gain = (loss.gather(-1, index) - loss.gather(-1, up)).squeeze(-1)
        extra = (cost.gather(-1, up) - cost.gather(-1, index)).squeeze(-1)
        left = allowed - float(cost.gather(-1, index).sum())
        fits = (gain > 0) & (extra <= left + 1e-9 * abs(allowed)) & (index.squeeze(-1) < last)
        if not bool(fits.any()):
            return index
        best = torch.where(fits, gain / extra.clamp(min=1e-300), -1.0).argmax()
        index = index.clone()
        index[best] += 1
