"""Where a coding's error comes from: by quantiles of the magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Coding
from stages.errors import InputError
from stages.neurons.spikes import Params


@dataclass(frozen=True)
class QuantileError:
    """Of every bin of |x|, each [sites, bins] float64.

    share: the bin's part of the squared error (sums to one); relative: the squared error of its
    values over their power, NaN where they are all zero.
    """

    share: Tensor
    relative: Tensor


def error_by_quantile(
    coding: Coding, atoms: Atoms, params: Params, edges: Sequence[float]
) -> QuantileError:
    """Error of the magnitudes between the quantiles `edges` (ascending from 0 to 1), over the atoms.

    An atom across an edge is divided between both bins. Shares of a coding without error are NaN.
    Raises InputError for other edges, or for a coding without an error on single values.
    """
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or sorted(set(edges)) != list(edges):
        raise InputError(f"edges={list(edges)}: give quantiles that ascend from 0 to 1")
    if not coding.shares_levels:
        raise InputError(f"{coding.name} has no error on single values: choose another coding")
    x, weight = atoms.signed_points()
    order = x.abs().argsort(-1)
    x, weight = x.gather(-1, order), weight.gather(-1, order)
    value, _ = coding.quantise(x.float(), {name: p.float() for name, p in params.items()})
    squares = ((value.double() - x) ** 2, x**2)
    stop = weight.cumsum(-1)
    start = torch.nn.functional.pad(stop[:, :-1], (1, 0))
    bounds = list(edges[:-1]) + [torch.inf]  # what rounding leaves above one belongs to the last
    error, power = (
        torch.stack([(part * s).sum(-1) for part in _parts(start, stop, bounds)], -1)
        for s in squares
    )
    return QuantileError(error / error.sum(-1, keepdim=True), error / power)


def _parts(start: Tensor, stop: Tensor, bounds: Sequence[float]) -> list[Tensor]:
    """The weight that every point, between cumulative weights start and stop, has in each bin."""
    return [
        (stop.clamp(max=high) - start.clamp(min=low)).clamp(min=0)
        for low, high in zip(bounds[:-1], bounds[1:], strict=True)
    ]
