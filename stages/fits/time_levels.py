"""Levels of a time code under prices: where they lie, how many there are, and what is better silent.

A level costs a slot, a spike its price, an error what it costs the model. Where levels lie `gap` apart,
the values of a cell of width W whose errors weigh M cost M gap^2 / 12 + slot W / gap: the best gap is
∝ (M / W)^(-1/3), the optimal density of levels λ* (Bennett 1948; with a price of rate: entropy-constrained
quantisation, Chou, Lookabaugh & Gray 1989). Gaps are powers of two of one step that do not fall from zero
outwards; a dynamic programme over cells finds them together with the end of the silent zone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad

PER_OCTAVE = 8
OCTAVES = 22  # cells below the largest magnitude
GAPS = 20  # powers of two, from 2^-21 of the largest magnitude on
DENSITIES = tuple(round(2 ** (k / 3)) for k in range(4, 28))  # levels aimed at, 3 to 512
NEARER = tuple(2 ** (k / 12) for k in (-3, -2, -1, 1, 2, 3))  # then, times the best one of a site
REACH = 4  # densities aimed at, times the most levels: silence takes some
# The finest gap in units of the largest magnitude, shifted by fractions of an octave.
FINEST = tuple(2.0 ** (fraction + 1 - OCTAVES) for fraction in (0.0, 0.25, 0.5, 0.75))
AT_ONCE = 2**19  # numbers that levels tried together may hold in one tensor
# Parts of the mean magnitude by which one-sided values may be off in the mean.
LOSSES = (1e-3, 1e-2, 1e-1)
ONE_SIDED = 0.5


@dataclass(frozen=True)
class Points:
    """What is coded: magnitudes x [S, K] ascending with the variance around each, what a squared error
    of each weighs, how often each occurs, and the mean of its sign; `spike` [S] is the price of a spike a
    value, `coherent` [S] that of a squared mean error.

    Errors of independent signs add up to their squares in a sum of `width` products. A mean error adds
    up by itself, `width` times as much: probabilities are positive, and what is silent of them is missing.
    """

    x: Tensor
    variance: Tensor
    weight: Tensor
    mass: Tensor
    sign: Tensor
    spike: Tensor
    coherent: Tensor

    def rows(self, index: Tensor) -> Points:
        """Those of the sites in `index`."""
        return Points(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def spikes(self) -> Tensor:
        """How often a point can spike: zero never does."""
        return self.mass * (self.x > 0)

    @property
    def one_sided(self) -> Tensor:
        """The sites whose values mostly have one sign, [number]."""
        size = self.mass * self.x
        return ((size * self.sign).sum(-1).abs() > ONE_SIDED * size.sum(-1)).nonzero().squeeze(-1)

    def silent(self) -> Tensor:
        """What silence costs at every point, but for its mean error."""
        return self.weight * (self.x**2 + self.variance)


@dataclass(frozen=True)
class Levels:
    """Of every site the first `number` [S] of the levels [S, most] ascending, whose last one is repeated,
    multiples of `unit` [S]; the end of the silent zone, how many levels lie above it, the cost of errors
    and the spikes a value, each [S]."""

    unit: Tensor
    table: Tensor
    number: Tensor
    end: Tensor
    used: Tensor
    error: Tensor
    spikes: Tensor

    def rows(self, index: Tensor) -> Levels:
        """Those of the sites in `index`."""
        return Levels(*(getattr(self, field.name)[index] for field in fields(self)))


def cheapest_levels(points: Points, slot: Tensor, most: int) -> Levels:
    """Levels of least error + price of spikes + `slot` [S] times their number, at most `most` a site."""
    best = _searched(points, slot, most, 0.0)
    one = points.one_sided
    part = points.rows(one)
    for loss in LOSSES if len(one) else ():
        best = better(points, slot, best, one, _searched(part, slot[one], most, loss))
    return best


def total_cost(points: Points, slot: Tensor, levels: Levels) -> Tensor:
    """Errors + price of spikes + price of levels, [S]."""
    return levels.error + points.spike * levels.spikes + slot * levels.used


def _searched(points: Points, slot: Tensor, most: int, loss: float) -> Levels:
    """The best of all densities, where a mean error of `loss` is expected; then of densities near the
    best one of every site."""
    cells = _Cells.of(points, loss)
    aims = [d for d in DENSITIES if d <= REACH * most or d == DENSITIES[0]]
    best, aim = _best(points, slot, cells, [torch.full_like(slot, d) for d in aims], most)
    near, _ = _best(points, slot, cells, [aim * factor for factor in NEARER], most)
    return better(points, slot, best, torch.arange(len(slot)), near)


def _best(
    points: Points, slot: Tensor, cells: _Cells, aims: list[Tensor], most: int
) -> tuple[Levels, Tensor]:
    """Of levels of all densities in `aims`, [S] each, at every finest gap the first ones that cost least
    at a site, and the density aimed at, [S]."""
    sites = torch.arange(len(slot))
    every = torch.stack(aims).repeat_interleave(len(FINEST), 0)  # [tries, S]
    finest = torch.tensor(FINEST * len(aims), dtype=torch.float64)
    widest = max(cells.weight.shape[1] * (1 + GAPS), points.x.shape[1], most)
    at_once = max(1, AT_ONCE // (len(sites) * widest))
    best, costs = None, []
    for aim, gap in zip(every.split(at_once), finest.split(at_once), strict=True):
        index = sites.repeat(len(aim))
        part, price = points.rows(index), slot[index]
        made = cells.rows(index).levels(aim.flatten(), gap.repeat_interleave(len(sites)), most)
        levels = silenced(part, *made)
        costs.append(total_cost(part, price, levels).view(-1, len(sites)))
        least = levels.rows(costs[-1].argmin(0) * len(sites) + sites)
        best = least if best is None else better(points, slot, best, sites, least)
    assert best is not None
    return best, every.gather(0, torch.cat(costs).argmin(0)[None])[0]


def better(points: Points, slot: Tensor, old: Levels, index: Tensor, new: Levels) -> Levels:
    """`old` with the sites in `index` from `new`, where they cost less."""
    part, price = points.rows(index), slot[index]
    win = total_cost(part, price, new) < total_cost(part, price, old.rows(index))
    return Levels(
        *(
            getattr(old, field.name).index_copy(0, index[win], getattr(new, field.name)[win])
            for field in fields(old)
        )
    )


@dataclass(frozen=True)
class _Cells:
    """Cells of |x|, an equal part of an octave each: edges [S, C + 1]; by cell the weight of errors, the
    cost of silence and that of spikes, [S, C]."""

    edges: Tensor
    weight: Tensor
    silent: Tensor
    spiking: Tensor

    @classmethod
    def of(cls, points: Points, loss: float) -> _Cells:
        top = points.x.amax(-1, keepdim=True)
        top = torch.where(top > 0, top, 1.0)  # a site without a value but zero
        places = 2.0 ** (torch.arange(-OCTAVES * PER_OCTAVE, 1, dtype=torch.float64) / PER_OCTAVE)
        edges = pad(places, (1, 0)) * top
        cell = (torch.searchsorted(edges, points.x) - 1).clamp(0, len(places) - 1)
        size = points.mass * points.x
        mean = loss * size.sum(-1, keepdim=True)
        silent = points.silent() + 2 * points.coherent[:, None] * mean * size * points.sign.abs()
        rows = (points.weight, silent, points.spike[:, None] * points.spikes)
        empty = torch.zeros(len(top), len(places), dtype=torch.float64)
        return cls(edges, *(empty.scatter_add(1, cell, row) for row in rows))

    def rows(self, index: Tensor) -> _Cells:
        """Those of the sites in `index`."""
        return _Cells(*(getattr(self, field.name)[index] for field in fields(self)))

    def gaps(self, aim: Tensor, finest: Tensor) -> Tensor:
        """The gap in every cell [S, C], 0 where it is silent, for about `aim` [S] levels.

        The least one is `finest` [S] in units of the largest magnitude.
        """
        width = self.edges.diff()
        # Without silence and rounding, L levels lose I^3 / (12 L^2), so one more saves I^3 / (6 L^3).
        slot = (self.weight * width**2).pow(1 / 3).sum(-1) ** 3 / (6 * aim**3)
        least = self.edges[:, -1:] * finest[:, None]
        gap = least * 2.0 ** torch.arange(GAPS, dtype=torch.float64)
        error = self.weight[..., None] * gap[:, None] ** 2 / 12
        levels = slot[:, None, None] * width[..., None] / gap[:, None]
        cost = torch.cat([self.silent[..., None], error + levels + self.spiking[..., None]], -1)
        state = _rising(cost)  # [S, C] of 1 + GAPS
        return torch.where(state > 0, gap.gather(-1, (state - 1).clamp(min=0)), 0.0)

    def levels(self, aim: Tensor, finest: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """The unit of levels [S], these [S, most] ascending, and their number [S].

        The last one is repeated. Where there are more than `most`, the last ones are missing. A site
        that is better silent has one.
        """
        gap, top = self.gaps(aim, finest), self.edges[:, -1]
        first = (gap > 0).int().argmax(-1, keepdim=True)
        step = gap.gather(-1, first).squeeze(-1)
        step = torch.where(step > 0, step, top)
        begin = self.edges.gather(-1, first).squeeze(-1)
        place = step * ((begin + step / 2) / step).round().clamp(min=1)
        rows = [place]
        for _ in range(most - 1):
            cell = torch.searchsorted(self.edges, place[:, None], right=True) - 1
            by = gap.gather(-1, cell.clamp(0, gap.shape[1] - 1)).squeeze(-1)
            place = torch.where((by > 0) & (place + by / 2 <= top), place + by, place)
            rows.append(place)
        table = torch.stack(rows, -1)
        return step, table, 1 + (table.diff(dim=-1) > 0).sum(-1)


def _rising(cost: Tensor) -> Tensor:
    """The states of least summed cost [S, C, states] that do not fall from cell to cell, [S, C]."""
    best = torch.full_like(cost[:, 0], torch.inf)
    best[:, 0] = 0
    origins = []
    for cell in cost.unbind(1):
        lowest, origin = best.cummin(-1)
        origins.append(origin)
        best = lowest + cell
    state = best.argmin(-1, keepdim=True)
    states = []
    for origin in reversed(origins):
        states.append(state)
        state = origin.gather(-1, state)
    return torch.cat(states[::-1], -1)


def silenced(points: Points, unit: Tensor, table: Tensor, number: Tensor) -> Levels:
    """The end of the silent zone that costs least with levels [S, L]: below it nothing spikes, above it
    the nearest level is sent."""
    middle = (table[:, 1:] + table[:, :-1]) / 2
    value = table.gather(-1, torch.searchsorted(middle, points.x, right=True))
    spiking = points.weight * ((points.x - value) ** 2 + points.variance)
    size = points.mass * points.sign
    spikes = _cut(points.spikes, torch.zeros_like(points.x))
    mean = _cut(size * (value - points.x), -size * points.x)
    error = _cut(spiking, points.silent()) + points.coherent[:, None] * mean**2
    cost = error + points.spike[:, None] * spikes
    never = pad(points.x, (0, 1), value=torch.inf) == 0  # zero does not spike
    cut = torch.where(never, torch.inf, cost).argmin(-1, keepdim=True)
    # Halfway between the last silent value and the first that spikes.
    ends = pad(points.x, (1, 1))
    ends[:, -1] = 2 * points.x[:, -1] + table[:, -1]
    end = (ends.gather(-1, cut) + ends.gather(-1, cut + 1)) / 2
    index = torch.arange(middle.shape[1])
    inside = ((middle <= end) & (index < number[:, None] - 1)).sum(-1)
    at = (t.gather(-1, cut).squeeze(-1) for t in (error, spikes))
    return Levels(unit, table, number, end.squeeze(-1), number - inside, *at)


def _cut(above: Tensor, below: Tensor) -> Tensor:
    """The sum of `below` up to every place and of `above` from it on, [S, K + 1]."""
    return pad(above.flip(-1).cumsum(-1).flip(-1), (0, 1)) + pad(below.cumsum(-1), (1, 0))


def segments(levels: Levels) -> dict[str, Tensor]:
    """The parameters of `stages.neurons.slots` for these levels; those inside the silent zone go."""
    given = (levels.unit, levels.table, levels.number, levels.end)
    rows = [_segments(*row) for row in zip(*given, strict=True)]
    width = max(len(row["start"]) for row in rows)
    filled = {"scale": torch.stack([row.pop("scale") for row in rows])}
    for name in rows[0]:
        filled[name] = torch.stack([_filled(row[name], width, name == "start") for row in rows])
    return filled


def _segments(unit: Tensor, table: Tensor, number: Tensor, end: Tensor) -> dict[str, Tensor]:
    """Those of one site."""
    level = table[: int(number)]
    middle = (level[1:] + level[:-1]) / 2
    level = level[int((middle <= end).sum()) :]
    steps = (level / unit).round()
    # Below the first level: that of the second, or less where zero is nearer.
    first = 2.0 ** torch.minimum(steps[:1], steps.diff()[:1].clamp(min=1)).log2().floor()
    gap = torch.cat([first if len(steps) > 1 else 2.0 ** steps.log2().floor(), steps.diff()])
    new = pad(gap.diff() != 0, (1, 0), value=True)
    last = torch.cat([new[1:], new.new_ones(1)])
    base = steps[new] - gap[new]
    start = base + gap[new] / 2
    start[0] = end / unit
    return {"scale": unit, "start": start, "base": base, "gap": gap[new], "end": steps[last]}


def _filled(row: Tensor, width: int, infinite: bool) -> Tensor:
    """A row filled up with its last, or with infinity."""
    rest = row.new_full((1,), torch.inf) if infinite else row[-1:]
    return torch.cat([row, rest.expand(width - len(row))])
