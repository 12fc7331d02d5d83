"""The optimal scalar quantiser of weighted points: dynamic programming, companding, Lloyd's alternation.

Points x [sites, K] are ascending, and their weights [sites, K] are not negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECES_PER_LEVEL = 4


def lloyd(x: Tensor, weight: Tensor, levels: Tensor, iterations: int) -> Tensor:
    """Lloyd's alternation on weighted points x [sites, K] ascending, from levels [sites, L]."""
    total = running(weight)
    first = running(weight * x)
    for _ in range(iterations):
        middle = (levels[:, 1:] + levels[:, :-1]) / 2
        cut = torch.searchsorted(x, middle)
        ends = torch.cat(
            [torch.zeros_like(cut[:, :1]), cut, torch.full_like(cut[:, :1], x.shape[1])], -1
        )
        mass = total.gather(-1, ends).diff()
        centroid = first.gather(-1, ends).diff() / mass.clamp(min=1e-300)
        levels = torch.where(mass > 0, centroid, levels)
    return levels


def companded_cells(x: Tensor, weight: Tensor, levels: int) -> Tensor:
    """Levels at equal lambda* ∝ p^(1/3) mass, [sites, levels]."""
    mass = running(_optimal_mass(x, weight))
    want = (torch.arange(levels, dtype=x.dtype) + 0.5) / levels * mass[:, -1:]
    index = torch.searchsorted(mass, want).clamp(1, x.shape[1]) - 1
    return x.gather(-1, index)


def optimal_cells(x: Tensor, weight: Tensor, levels: int) -> Tensor:
    """Centroids of the optimal cells over the points merged to a few pieces a level, [sites, levels].

    Dynamic programming: best[l, j] = min_i best[l-1, i] + cost(i, j). The best i grows with j, so the
    rows of a level are searched by halving (divide and conquer), all sites and all rows of a depth at
    once.
    """
    total, first, second = _pieces(x, weight, levels * PIECES_PER_LEVEL)
    pieces = total.shape[1] - 1

    def cost(i: Tensor, j: Tensor) -> Tensor:
        mass, linear, square = (t.gather(-1, j) - t.gather(-1, i) for t in (total, first, second))
        return (square - linear**2 / mass.clamp(min=1e-300)).clamp(min=0)

    ends = torch.arange(pieces + 1).expand(len(x), -1)
    best = cost(torch.zeros_like(ends), ends)
    origins = []
    for _ in range(1, levels):
        best, origin = _next_level(best, cost, pieces)
        origins.append(origin)
    cuts = [torch.full((len(x), 1), pieces)]
    for origin in reversed(origins):
        cuts.append(origin.gather(-1, cuts[-1]))
    edges = torch.cat([torch.zeros_like(cuts[0]), *cuts[::-1]], -1)
    mass = total.gather(-1, edges).diff()
    centroid = first.gather(-1, edges).diff() / mass.clamp(min=1e-300)
    return torch.where(mass > 0, centroid, x.amax(-1, keepdim=True)).sort(-1).values


def _next_level(best, cost, pieces: int) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """One level of the dynamic programme: its costs and origins, each [sites, pieces + 1]."""
    sites = len(best)
    least = torch.full_like(best, torch.inf)
    origin = torch.zeros(sites, pieces + 1, dtype=torch.long)
    least[:, 0] = 0
    stride = 1 << (pieces.bit_length() - 1)
    while stride >= 1:
        rows = torch.arange(stride, pieces + 1, 2 * stride)
        low = origin[:, rows - stride]
        high = origin[:, (rows + stride).clamp(max=pieces)]
        high = torch.where(rows + stride > pieces, rows, torch.minimum(high, rows))
        span = int((high - low).amax()) + 1
        i = torch.minimum(low[..., None] + torch.arange(span), high[..., None])
        j = rows[:, None].expand(sites, -1, span)
        value = best.gather(-1, i.flatten(1)) + cost(i.flatten(1), j.flatten(1))
        row = value.view(i.shape).min(-1)
        least[:, rows] = row.values
        origin[:, rows] = i.gather(-1, row.indices[..., None]).squeeze(-1)
        stride //= 2
    return least, origin


def _pieces(x: Tensor, weight: Tensor, pieces: int) -> tuple[Tensor, Tensor, Tensor]:
    """Running sums of mass, mass x and mass x^2 at `pieces` places of equal p^(1/3) mass."""
    sums = [running(weight * x**k) for k in range(3)]
    mass = running(_optimal_mass(x, weight))
    want = torch.arange(pieces + 1, dtype=x.dtype) / pieces * mass[:, -1:]
    cut = torch.searchsorted(mass, want).clamp(max=x.shape[1])
    cut[:, 0], cut[:, -1] = 0, x.shape[1]
    return tuple(total.gather(-1, cut) for total in sums)  # type: ignore[return-value]


def _optimal_mass(x: Tensor, weight: Tensor) -> Tensor:
    """∫ p^(1/3) over the cells of points x, which end halfway to both neighbours: a gap counts at both
    its ends, so that a cut can fall on either side of it."""
    gap = torch.nn.functional.pad(x.diff(), (1, 1))
    width = (gap[:, 1:] + gap[:, :-1]) / 2
    return (weight * width.square()) ** (1 / 3)


def running(x: Tensor) -> Tensor:
    """Sums of the first 0, 1, … K of x [sites, K], [sites, K + 1]."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))
