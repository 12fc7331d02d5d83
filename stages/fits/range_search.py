"""The ranges of a bank of neurons: least expected error, or error and spikes, over the atoms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.neurons.spikes import Params

SITES_AT_ONCE = 16
# Candidate ranges: 16 octaves below the maximum at six an octave, then finer around the best ones.
OCTAVES = 16
PER_OCTAVE = 6
REFINEMENTS = (1 / 24, 1 / 96, 1 / 384)
MOVES = (1 / 6, 1 / 24, 1 / 96)  # octaves a step of the coordinate search
PASSES = 2

Cost = Callable[[Tensor, Params], Tensor]


def nested_ranges(
    value: Tensor, spread: Tensor, weight: Tensor, timesteps: Sequence[int]
) -> Tensor:
    """The n scales of least expected squared error, [sites, n] ascending, by dynamic programming.

    value, spread, weight [sites, K]: atoms, ascending; neuron k has timesteps[k] steps and codes |x|
    from zero on. Exact over the candidates; those are refined around the optimum until they lie
    1/384 of an octave apart.
    """
    top = value.amax(-1, keepdim=True)
    octaves = torch.arange(-OCTAVES * PER_OCTAVE, 4, dtype=torch.float64) / PER_OCTAVE
    best = _search(value, spread, weight, top * 2.0**octaves, timesteps)
    near = torch.arange(-4, 5, dtype=torch.float64)
    for fraction in REFINEMENTS:
        local = best[..., None] * 2.0 ** (near * fraction)
        candidates = local.flatten(1).sort(-1).values
        best = _search(value, spread, weight, candidates, timesteps)
    return best


def even_levels(value: Tensor, spread: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    """The largest of 2^bits even levels from zero on with least expected squared error, [sites].

    value, spread, weight [sites, K]: atoms, ascending; bits [sites]. Exact over the candidates of
    `nested_ranges`, 1/384 of an octave apart around the optimum.
    """
    best = torch.empty_like(value[:, 0])
    for count in bits.unique().tolist():
        for index in torch.nonzero(bits == count)[:, 0].split(SITES_AT_ONCE):
            part = (value[index], spread[index], weight[index])
            best[index] = nested_ranges(*part, [count])[:, 0] * (1 - 2.0**-count)
    return best


def adjacent_ranges(value: Tensor, weight: Tensor, timesteps: Sequence[int]) -> Tensor:
    """The n scales of least step^2 / 12 for neurons that each code from the last range's end on,
    [sites, n] ascending: a start for the coordinate search, which counts the error itself."""
    top = value.amax(-1, keepdim=True)
    octaves = torch.arange(-OCTAVES * PER_OCTAVE, 4, dtype=torch.float64) / PER_OCTAVE
    scale = top * 2.0**octaves
    mass = torch.nn.functional.pad((weight * (value > 0)).cumsum(-1), (1, 0))
    under = mass.gather(-1, torch.searchsorted(value, scale))
    total = scale**2 / 12 * 4.0 ** -timesteps[0] * under
    width = (scale[:, :, None] - scale[:, None, :]).clamp(min=0)  # [S, j, i]
    held = under[:, :, None] - under[:, None, :]
    rising = torch.ones_like(width[0]).tril(-1).bool()
    choice = []
    for steps in timesteps[1:]:
        error = width**2 / 12 * 4.0**-steps * held
        step = torch.where(rising, total[:, None, :] + error, torch.inf).min(-1)
        choice.append(step.indices)
        total = step.values
    over = (value[:, None] >= scale[..., None]).double() * weight[:, None]
    beyond = ((value[:, None] - scale[..., None]) ** 2 * over).sum(-1)
    picked = [(total + beyond).argmin(-1, keepdim=True)]
    for indices in reversed(choice):
        picked.append(indices.gather(-1, picked[-1]))
    return scale.gather(-1, torch.cat(picked[::-1], -1))


def coordinate_search(start: Tensor, cost: Cost, bank: Callable[[Tensor], Params]) -> Tensor:
    """Move one scale at a time, in ever smaller steps, while the cost falls: [sites, n] -> [sites, n].

    `bank` makes the parameters of scales [sites, C, n], and cost(scales, parameters) [sites, C] is
    the exact objective.
    """
    near = torch.arange(-4, 5, dtype=torch.float64)
    best = start
    for fraction in MOVES:
        for _ in range(PASSES):
            for k in range(start.shape[1] - 1, -1, -1):
                moved = best[:, None, :].repeat(1, len(near), 1)
                moved[..., k] *= 2.0 ** (near * fraction)
                falling = (moved.diff(dim=-1) <= 0).any(-1)
                costs = torch.where(falling, torch.inf, cost(moved, bank(moved)))
                pick = costs.argmin(-1)[:, None, None].expand(-1, 1, start.shape[1])
                best = moved.gather(1, pick).squeeze(1)
    return best


def _search(
    value: Tensor, spread: Tensor, weight: Tensor, scale: Tensor, timesteps: Sequence[int]
) -> Tensor:
    """Best ascending choice among candidate scales [sites, J], ascending, one for every neuron."""
    costs = {t: _costs(value, spread, weight, scale, t) for t in set(timesteps)}
    total, choice = costs[timesteps[0]][0].diagonal(dim1=-2, dim2=-1), []
    # total[j]: least cost of everything below candidate j's limit if j is the k-th range.
    rising = torch.ones_like(costs[timesteps[0]][0][0]).tril().bool()  # [j, i]: i <= j
    for steps in timesteps[1:]:
        below = costs[steps][0]
        options = torch.where(rising, total[:, None, :] - below, torch.inf)
        step = options.min(-1)
        choice.append(step.indices)
        total = below.diagonal(dim1=-2, dim2=-1) + step.values
    last = (total + costs[timesteps[-1]][1]).argmin(-1, keepdim=True)
    picked = [last]
    for indices in reversed(choice):
        picked.append(indices.gather(-1, picked[-1]))
    return scale.gather(-1, torch.cat(picked[::-1], -1))


def _costs(
    value: Tensor, spread: Tensor, weight: Tensor, scale: Tensor, timesteps: int
) -> tuple[Tensor, Tensor]:
    """below [sites, j, i]: error of candidate j on all values under candidate i's limit;
    beyond [sites, j]: its error on the values that saturate it."""
    step = scale * 2.0**-timesteps
    limit = scale * (1 - 2.0 ** -(timesteps + 1))
    error = step[..., None] ** 2 * rounding_error(
        value[:, None] / step[..., None], spread[:, None] / step[..., None]
    )
    running = torch.nn.functional.pad((error * weight[:, None]).cumsum(-1), (1, 0))
    under = torch.searchsorted(value, limit)
    below = running.gather(-1, under[:, None, :].expand(-1, scale.shape[1], -1))
    top = (scale - step)[..., None]
    over = (value[:, None] >= limit[..., None]).double()
    miss = ((value[:, None] - top) ** 2 + spread[:, None] ** 2) * weight[:, None]
    return below, (miss * over).sum(-1)


def rounding_error(mean: Tensor, spread: Tensor) -> Tensor:
    """Mean squared distance to the nearest whole number of values spread evenly about `mean` with
    standard deviation `spread`, exactly: differences of the integral of (z - round z)^2."""
    half = spread * 3**0.5
    narrow = half < 1e-3
    wide = torch.where(narrow, 1.0, half)
    spread_out = (_integral(mean + wide) - _integral(mean - wide)) / (2 * wide)
    return torch.where(narrow, (mean - mean.round()) ** 2 + spread**2, spread_out)


def _integral(z: Tensor) -> Tensor:
    whole = z.round()
    rest = z - whole
    return whole / 12 + rest * rest * rest / 3
