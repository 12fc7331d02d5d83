"""Free levels of a time code under prices: Lloyd's alternation from levels at gaps of powers of two.

With a price on spikes alone all levels cost the same, so thresholds between them lie halfway and each
level is the centroid of its cell; silence costs nothing, and its zone ends later. Together: the
entropy-constrained quantiser (Chou, Lookabaugh & Gray 1989).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from stages.fits.time_levels import Levels, Points, better, silenced, total_cost

ROUNDS = 60
CONVERGED = 1e-6  # of the cost, by which a round lowers it at least


def freed(points: Points, slot: Tensor, levels: Levels) -> Levels:
    """Levels as many as given and no worse, each free."""
    every = torch.arange(len(slot))
    best = last = levels
    for _ in range(ROUNDS):
        table = _centroids(points, last)
        last = silenced(points, last.unit, table, last.number)
        before = total_cost(points, slot, best)
        best = better(points, slot, best, every, last)
        if bool((total_cost(points, slot, best) > (1 - CONVERGED) * before).all()):
            break
    return best


def _centroids(points: Points, levels: Levels) -> Tensor:
    """The levels [S, L] of least cost in the cells that they have.

    Level k is the weighted mean of its cell, and lower by coherent E M_k / W_k: M_k the signed mass of
    the cell, W_k its weight, E the mean error that is left.
    """
    middle = (levels.table[:, 1:] + levels.table[:, :-1]) / 2
    cell = torch.searchsorted(middle, points.x, right=True)
    cell = torch.minimum(cell, levels.number[:, None] - 1)
    spiking = points.x >= levels.end[:, None]
    signed = points.mass * points.sign
    zeros = torch.zeros_like(levels.table)

    def summed(row: Tensor) -> Tensor:
        return zeros.scatter_add(-1, cell, torch.where(spiking, row, 0.0))

    weight, mass = summed(points.weight), summed(signed)
    heavy = weight.clamp(min=1e-300)
    mean = torch.where(weight > 0, summed(points.weight * points.x) / heavy, levels.table)
    pull = torch.where(weight > 0, mass / heavy, 0.0)
    value = torch.where(spiking, mean.gather(-1, cell), 0.0)
    error = (signed * (value - points.x)).sum(-1, keepdim=True)
    coherent = points.coherent[:, None]
    error = error / (1 + coherent * (mass * pull).sum(-1, keepdim=True))
    table = (mean - coherent * error * pull).clamp(min=0)
    table = torch.where(weight > 0, table, levels.table).cummax(-1).values
    index = torch.arange(table.shape[1])
    top = table.gather(-1, levels.number[:, None] - 1)
    return torch.where(index < levels.number[:, None], table, top)


def free_levels(levels: Levels) -> dict[str, Tensor]:
    """The parameters of `stages.neurons.free_slots` for these levels; those inside the silent zone go."""
    given = (levels.table, levels.number, levels.end)
    rows = [_used(*row) for row in zip(*given, strict=True)]
    most = max(len(level) for level, _ in rows)
    tables = [torch.cat([pad(v, (1, 0)), v[-1:].expand(most - len(v))]) for v, _ in rows]
    starts = [pad(start, (0, most - len(start)), value=torch.inf) for _, start in rows]
    return {"levels": torch.stack(tables), "thresholds": torch.stack(starts)}


def _used(table: Tensor, number: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The levels of one site outside its silent zone, and their thresholds."""
    level = table[: int(number)]
    middle = (level[1:] + level[:-1]) / 2
    first = int((middle <= end).sum())
    return level[first:], torch.cat([end[None], middle[first:]])
