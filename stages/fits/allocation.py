"""Timesteps for every site under a budget: where a step buys the most predicted loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ALLOCATIONS = ("uniform", "budget", "price")
BUDGETS = ("timesteps", "spikes")
REACH = (-2, -1, 0, 1, 2)  # how far a site's T may lie from the mean
HALVINGS = 60


def picked(fits: Sequence[Mapping[str, Tensor]], index: Tensor) -> dict[str, Tensor]:
    """Take every site's parameters out of the fit that `index` [sites] names."""
    stacked = {name: torch.stack([p[name] for p in fits], 1) for name in fits[0]}
    rows = torch.arange(len(index))
    return {name: t[rows, index] for name, t in stacked.items()}


def cheapest(loss: Tensor, cost: Tensor, allowed: float) -> Tensor:
    """The choice of every site of least summed loss whose summed cost is within `allowed`: loss and
    cost [sites, choices] -> [sites].

    It is that of least loss + price * cost at the smallest price that keeps within the budget (Shoham
    & Gersho 1988, bit allocation for an arbitrary set of quantisers), with what is left over spent
    greedily.
    """

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
    """Spend what the last price left over, one step of one site at a time, best first."""
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
