"""Convergence of a fit: its loss curve as C + a rho^k, a linear rate and the error it settles at.

The paper's Theorem 2 bounds Algorithm 1's loss by a linearly shrinking term plus an error that the
smoothing of the spike sets. The curve is fitted as it is, with the steps where it rises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import InputError

SITES_AT_ONCE = 32
SHORTEST = 0.2  # iterations in which the transient falls by 1/e: the range that is searched
LONGEST = 20  # the same, in lengths of the curve
GRID = 200
REFINEMENTS = 4
FEWEST = 4  # points that a curve of three unknowns must have


@dataclass(frozen=True)
class Decay:
    """C + a rho^k of every curve, each [S] float64, and R^2, the part of its variance explained.

    C, a >= 0 and 0 < rho < 1. A curve that never falls has a = 0 and an undefined rho (NaN); R^2 of
    a constant curve is NaN.
    """

    limit: Tensor
    amplitude: Tensor
    rate: Tensor
    r2: Tensor


def fit_decay(curves: Tensor) -> Decay:
    """Least-squares C, a, rho of loss curves [S, iterations + 1], k counting from 0.

    Variable projection (Golub & Pereyra 1973): for each rho of a grid, refined around the best, C and
    a have a closed form. Raises InputError for curves of fewer than 4 points or that are not finite.
    """
    if curves.dim() != 2 or curves.shape[1] < FEWEST:
        raise InputError(
            f"loss curves of shape {list(curves.shape)}: need [sites, iterations], {FEWEST} or more "
            "iterations"
        )
    if not torch.isfinite(curves).all():
        raise InputError("loss curves hold nan or inf: fit again with smaller learning rates")
    parts = [_fit(chunk.double()) for chunk in curves.split(SITES_AT_ONCE)]
    limit, amplitude, rate, r2 = (torch.cat(part) for part in zip(*parts, strict=True))
    return Decay(limit, amplitude, rate, r2)


def _fit(curves: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = curves.abs().amax(-1, keepdim=True).clamp(min=1e-300)  # losses are as small as 1e-8
    y = curves / size
    low, high = torch.tensor([SHORTEST, LONGEST * curves.shape[1]], dtype=torch.float64).log()
    grid = torch.linspace(float(low), float(high), GRID, dtype=torch.float64)
    time, width = grid.expand(len(y), -1), float(grid[1] - grid[0])
    for _ in range(REFINEMENTS + 1):
        limit, amplitude, error = _project(y, (-1 / time.exp()).exp())
        best = error.argmin(-1, keepdim=True)
        limit, amplitude, error, centre = (
            t.gather(-1, best) for t in (limit, amplitude, error, time)
        )
        time = centre + torch.linspace(-width, width, 21, dtype=torch.float64)
        width /= 10
    spread = ((y - y.mean(-1, keepdim=True)) ** 2).sum(-1, keepdim=True)
    r2 = torch.where(spread > 0, 1 - error / spread, torch.nan)
    rate = torch.where(amplitude > 0, (-1 / centre.exp()).exp(), torch.nan)
    found = (limit * size, amplitude * size, rate, r2)
    return tuple(t.squeeze(-1) for t in found)  # type: ignore[return-value]


def _project(y: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best C, a >= 0 and their squared error for curves y [S, K] at every rate [S, R], each [S, R].

    Where the free optimum is negative the best lies on one of the two edges, C = 0 or a = 0.
    """
    g = rate[..., None] ** torch.arange(y.shape[1])  # [S, R, K]
    mean_y, mean_g = y.mean(-1)[:, None], g.mean(-1)
    centred = g - mean_g[..., None]
    free_a = (centred * y[:, None]).sum(-1) / (centred**2).sum(-1)
    free_c = mean_y - free_a * mean_g
    edge_a = ((g * y[:, None]).sum(-1) / (g**2).sum(-1)).clamp(min=0)
    nought = torch.zeros_like(free_a)
    flat_c = mean_y.clamp(min=0).expand_as(free_a)
    candidates = [(free_c, free_a), (nought, edge_a), (flat_c, nought)]
    errors = torch.stack([_error(y, g, c, a) for c, a in candidates])
    errors[0] = torch.where((free_c < 0) | (free_a < 0), torch.inf, errors[0])
    error, choice = errors.min(0)
    limit, amplitude = (
        torch.stack(pair).gather(0, choice[None]).squeeze(0)
        for pair in zip(*candidates, strict=True)
    )
    return limit, amplitude, error


def _error(y: Tensor, g: Tensor, limit: Tensor, amplitude: Tensor) -> Tensor:
    return ((limit[..., None] + amplitude[..., None] * g - y[:, None]) ** 2).sum(-1)
