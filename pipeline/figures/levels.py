"""The density of levels that the codings of a sweep reach at a few typical sites, and its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from pipeline.figures.comparisons import Looks, series_names
from pipeline.figures.sites import SHOWN_DECADES
from pipeline.figures.style import (
    STYLE,
    WIDTH,
    Array,
    entry,
    legend_above,
    legend_beside,
    noted,
)
from pipeline.results.folders import RunFolder
from stages.codings.base import Coding, site_params
from stages.distribution import Densities
from stages.fitted import FittedNeurons

TYPICAL = ("mlp.down", "attn.in", "mlp.act")  # heavy tails, a norm's output, one-sided
SITES = 3
SHOWN_X = 5  # decades of magnitudes, below which the densities are level
PROBES = 1 << 15
TIMESTEPS = 6  # the T shown is the one nearest to it
GAPS = 32  # a density is averaged over this part of all the gaps between levels


@dataclass(frozen=True)
class SiteLevels:
    """One site: p and lambda* on x, and the density of levels of every coding there, by series.

    All per unit of magnitude and integrating to about one; NaN beyond a coding's largest level.
    """

    name: str
    x: Array
    density: Array
    optimal: Array
    levels: Mapping[str, Array]


def site_levels(jobs: Mapping[RunFolder, Mapping[str, Any]]) -> tuple[list[SiteLevels], str]:
    """Typical sites of the middle layer with the level density of every coding, and what is shown.

    Of the jobs: those of the first distribution, one a coding. Codings that scale every token,
    and so have other levels in each, are left out and named.
    """
    shown, steps = chosen(jobs)
    if len(shown) < 2:
        return [], ""
    first = next(iter(shown.values()))
    densities = Densities.load(first.artifact("distribution"))
    by_coding: dict[str, dict[str, Array]] = {}
    left_out: list[str] = []
    others: list[str] = []  # codings of another T
    seen = set()
    for name, job in shown.items():
        coding: Coding = instantiate(job.config.coding, _convert_="all")
        if not coding.shares_levels:
            left_out.append(name)
        elif coding not in seen:
            seen.add(coding)
            neurons = FittedNeurons.load(job.artifact("fitting"))
            by_coding[name] = _of_coding(coding, neurons, densities)
            others += [f"{name} T = {coding.timesteps}"] if coding.timesteps != steps else []
    if len(by_coding) < 2:
        return [], ""
    note = ", ".join([f"T = {steps}", *others])
    if left_out:
        note += f"; levels differ from token to token: {', '.join(left_out)}"
    return [_site(index, densities, by_coding) for index in _typical(densities)], note


def chosen(jobs: Mapping[RunFolder, Mapping[str, Any]]) -> tuple[dict[str, RunFolder], int]:
    """One job of every series: of the T nearest to 6, or of the only T that it has."""
    converted = {f: r for f, r in jobs.items() if "fitting" in r.get("keys", {})}
    if not converted:
        return {}, 0
    source = next(iter(converted.values()))["keys"]["distribution"]
    converted = {f: r for f, r in converted.items() if r["keys"]["distribution"] == source}
    names = dict(zip(jobs, series_names(list(jobs.values())), strict=True))
    steps: dict[str, set[int]] = {}
    for folder, result in converted.items():
        steps.setdefault(names[folder], set()).add(result["timesteps"])
    swept = [t for each in steps.values() if len(each) > 1 for t in each]
    every = swept or [result["timesteps"] for result in converted.values()]
    nearest = min(every, key=lambda t: (abs(t - TIMESTEPS), t))
    shown: dict[str, RunFolder] = {}
    for folder, result in converted.items():
        name = names[folder]
        if result["timesteps"] == nearest or steps[name] == {result["timesteps"]}:
            shown.setdefault(name, folder)
    return shown, nearest


def _typical(densities: Densities) -> list[int]:
    """Sites of the middle layer, the typical roles first."""
    middle = (max(densities.layers) + 1) // 2
    here = {r: i for i, r in enumerate(densities.roles) if densities.layers[i] == middle}
    roles = sorted(here, key=lambda r: TYPICAL.index(r) if r in TYPICAL else len(TYPICAL))
    return [here[role] for role in roles[:SITES]]


def _of_coding(coding: Coding, neurons: FittedNeurons, densities: Densities) -> dict[str, Array]:
    """Level density of a coding by site, at the sites that it codes."""
    rows = {site: row for row, site in enumerate(neurons.sites)}
    by_site = {}
    for index in _typical(densities):
        site = densities.sites[index]
        if site in rows:
            params = site_params(neurons.fit.params, rows[site])
            levels = reached(coding, params, float(densities.atoms.maximum[index]))
            by_site[site] = level_density(levels, _grid(densities))
    return by_site


def _site(
    index: int, densities: Densities, by_coding: Mapping[str, Mapping[str, Array]]
) -> SiteLevels:
    site = densities.sites[index]
    return SiteLevels(
        f"{densities.roles[index]}, layer {densities.layers[index]}",
        _grid(densities),
        densities.tensors["density"][index].numpy(),
        densities.tensors["optimal"][index].numpy(),
        {name: levels[site] for name, levels in by_coding.items() if site in levels},
    )


def _grid(densities: Densities) -> Array:
    edges = densities.tensors["edges"]
    return np.asarray((edges[1:] * edges[:-1]).sqrt())


def reached(coding: Coding, params: Mapping[str, Tensor], maximum: float) -> Array:
    """The magnitudes that some value up to `maximum` is given, ascending.

    Not the table's: a gated neuron never uses its coarse levels below a finer range.
    """
    even = torch.linspace(0, maximum, PROBES, dtype=torch.float64)
    small = maximum * torch.logspace(-6, 0, PROBES, dtype=torch.float64)
    value, _ = coding.quantise(torch.cat([even, small]).float(), params)
    return np.unique(value[value >= 0].double().numpy())


def level_density(levels: Sequence[float] | Array, x: Array) -> Array:
    """1 / (spacing L) at x for L ascending levels; NaN beyond the largest one.

    The spacing is the mean over L / 32 neighbouring gaps, one at least.
    """
    levels = np.asarray(levels)
    count = len(levels)
    if count < 2:
        return np.full(len(x), np.nan)
    gaps = max(1, count // GAPS)
    below = np.searchsorted(levels, x, side="right") - 1
    start = np.clip(below - (gaps - 1) // 2, 0, count - 1 - gaps)
    density = gaps / (count * (levels[start + gaps] - levels[start]))
    return np.where((x >= levels[0]) & (x <= levels[-1]), density, np.nan)


@rc_context(STYLE)
def level_densities(sites: Sequence[SiteLevels], rows: Sequence[Looks], note: str) -> Figure:
    """Columns of sites; in every row p, lambda* and the level densities of a few codings."""
    curves = [curve for site in sites for curve in site.levels.items()]
    present = {name for name, density in curves if (density > 0).any()}
    rows = [{name: look for name, look in row.items() if name in present} for row in rows]
    rows = [row for row in rows if row]
    figure = Figure(figsize=(WIDTH, 1.1 + 1.4 * len(rows)))
    grid = figure.subplots(len(rows), len(sites), squeeze=False, sharex="col", sharey="col")
    for number, (row, looks) in enumerate(zip(grid, rows, strict=True)):
        for axes, site in zip(row, sites, strict=True):
            _levels_panel(axes, site, looks)
            axes.set_title(site.name if number == 0 else "")
        handles = [
            entry(name, color=look["color"], linewidth=2 - 0.2 * place)
            for place, (name, look) in enumerate(looks.items())
        ]
        legend_beside(row[-1], handles)
    density = entry("density p(|x|)", color="0.65", linewidth=3)
    legend_above(figure, [density, entry("optimal λ* ∝ p$^{1/3}$", color="black", linestyle="--")])
    figure.supxlabel(noted("magnitude |x|", note))
    figure.supylabel("density per unit of |x|")
    return figure


def _levels_panel(axes: Axes, site: SiteLevels, looks: Looks) -> None:
    drawn = [site.levels[name] for name in looks if name in site.levels]
    peak = max(np.nanmax(values, initial=0) for values in (site.optimal, *drawn))
    axes.plot(site.x, _positive(site.density), color="0.65", linewidth=3)
    axes.plot(site.x, _positive(site.optimal), color="black", linestyle="--", zorder=3)
    for place, (name, look) in enumerate(looks.items()):
        if name in site.levels:  # thinner and thinner, so that equal densities are all seen
            values = _positive(site.levels[name])
            axes.plot(site.x, values, color=look["color"], linewidth=2.6 - 0.4 * place)
    axes.set(xscale="log", yscale="log")
    seen = site.x[site.density > 0]
    axes.set_xlim(max(seen[0], seen[-1] * 10.0**-SHOWN_X) / 1.5, seen[-1] * 1.5)
    lowest = np.nanmin(_positive(site.optimal))
    axes.set_ylim(max(lowest / 10, peak * 10.0**-SHOWN_DECADES), peak * 3)
    for axis, ticks in ((axes.xaxis, 4), (axes.yaxis, 5)):  # a column has room for so many
        axis.set_major_locator(LogLocator(numticks=ticks))
    axes.minorticks_off()


def _positive(values: Array) -> Array:
    return np.where(values > 0, values, np.nan)
