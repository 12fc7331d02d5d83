"""Convergence of a fit: its loss curve as C + a rho^k, a linear rate and the error it settles at.

The paper's Theorem 2 bounds Algorithm 1's loss by a linearly shrinking term plus an error that the
smoothing of the spike sets. The curve is fitted as it is, with the steps where it rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar, nnls
from torch import Tensor

from stages.errors import InputError

SHORTEST = 0.2  # iterations in which the transient falls by 1/e: the range that is searched
LONGEST = 20  # the same, in lengths of the curve
GRID = 100
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
    """Fit C, a, rho to loss curves [S, iterations + 1] by least squares, k counting from 0.

    Variable projection (Golub & Pereyra 1973): C and a are the non-negative least squares of a rho,
    and rho is searched on a grid, then around its best point. Raises InputError for curves of fewer
    than 4 points or that are not finite.
    """
    if curves.dim() != 2 or curves.shape[1] < FEWEST:
        raise InputError(
            f"loss curves of shape {list(curves.shape)}: need [sites, iterations], {FEWEST} or more "
            "iterations"
        )
    if not torch.isfinite(curves).all():
        raise InputError("loss curves hold nan or inf: fit again with smaller learning rates")
    fits = torch.tensor([_fit(curve) for curve in curves.double().numpy()], dtype=torch.float64)
    return Decay(*fits.view(-1, 4).unbind(-1))


def _fit(curve: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float, float, float]:
    """C, a, rho and R^2 of one curve."""
    size = max(np.abs(curve).max(), 1e-300)  # losses are as small as 1e-8
    y, k = curve / size, np.arange(len(curve))

    def project(log_time: float) -> tuple[Any, float, float]:
        """(C, a), the norm of what they leave, and rho."""
        rate = np.exp(-np.exp(-log_time))
        return *nnls(np.stack([np.ones(len(k)), rate**k], axis=1), y), rate

    grid = np.linspace(np.log(SHORTEST), np.log(LONGEST * len(curve)), GRID)
    best = min(grid, key=lambda each: project(each)[1])
    width = grid[1] - grid[0]
    refined = minimize_scalar(
        lambda each: project(each)[1],
        bounds=(best - width, best + width),
        method="bounded",
        options={"xatol": 1e-9},
    )
    (limit, amplitude), error, rate = min(
        (project(t) for t in (best, refined.x)), key=lambda p: p[1]
    )
    spread = ((y - y.mean()) ** 2).sum()
    r2 = 1 - error**2 / spread if spread > 0 else np.nan
    return limit * size, amplitude * size, rate if amplitude > 0 else np.nan, r2
