"""Figures of the sites of a run: densities with levels, and maps of error and spikes by role and layer."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator

from pipeline.figures.style import ROLES, STYLE, Array, entry, legend_above, noted, panels
from pipeline.results.folders import RunFolder
from stages.codings.base import Coding, site_params
from stages.distribution import Densities
from stages.fitted import FittedNeurons

COLUMNS = 3
MAPS_A_ROW = 4
HEAD = "head.in"
GAP = 0.4  # between the layers' roles and the head
SHOWN_DECADES = 10  # a density is drawn this far below its peak
SHOWN_BELOW = 100  # and magnitudes down to this part of the smallest level: below, it is flat


@dataclass(frozen=True)
class RoleDensity:
    """The magnitudes of one role's site and the levels of the neuron fitted to them.

    `x` ascends; `density` is p(|x|) and `optimal` the normalised λ* ∝ p^(1/3), both at `x` and
    per unit of activation; `levels` are the magnitudes that the neuron can give, in any order.
    """

    x: Array
    density: Array
    optimal: Array
    levels: Array


def pictures(job: RunFolder) -> dict[str, Figure]:
    """The figures of one job as far as its coding has them: density with levels, error and spike rate."""
    coding: Coding = instantiate(job.config.coding, _convert_="all")
    name = job.result["label"]
    drawn = {"error_per_layer": error_per_layer({name: job.sites})}
    if coding.shares_levels:  # else they differ from token to token, or from channel to channel
        densities = Densities.load(job.artifact("distribution"))
        neurons = FittedNeurons.load(job.artifact("fitting"))
        drawn["density_and_levels"] = density_with_levels(
            role_densities(coding, densities, neurons)
        )
    if coding.neuron:
        drawn["spike_rate_per_layer"] = spike_rate_per_layer({name: job.sites})
    return drawn


def role_densities(
    coding: Coding, densities: Densities, neurons: FittedNeurons
) -> dict[str, RoleDensity]:
    """The middle layer's density of every role, and the levels of the neuron fitted to it."""
    edges = densities.tensors["edges"]
    x = (edges[1:] * edges[:-1]).sqrt().numpy()
    middle = (max(densities.layers) + 1) // 2
    shown = {}
    rows = {site: row for row, site in enumerate(neurons.sites)}
    for index, site in enumerate(densities.sites):
        role, layer = densities.roles[index], densities.layers[index]
        if layer in (middle, -1) and site in rows:
            levels = coding.table(site_params(neurons.fit.params, rows[site])).double()
            shown[role] = RoleDensity(
                x,
                densities.tensors["density"][index].numpy(),
                densities.tensors["optimal"][index].numpy(),
                levels.numpy(),
            )
    return shown


@rc_context(STYLE)
def density_with_levels(roles: Mapping[str, RoleDensity]) -> Figure:
    """Draw, one panel per role, the density of magnitudes, the optimal one and the levels."""
    figure, every = panels(len(roles), COLUMNS, 1.6)
    for role, axes in zip(sorted(roles, key=_order), every, strict=True):
        _density_panel(axes, role, roles[role])
    legend = [
        entry("density p(|x|)", color="0.3"),
        entry("optimal density λ* ∝ p$^{1/3}$", color="0.3", linestyle="--"),
    ]
    if any((density.levels > 0).any() for density in roles.values()):
        legend.append(entry("levels > 0", color="0.3", marker="|", linestyle="", markersize=8))
    legend_above(figure, legend)
    figure.supxlabel("magnitude |x|")
    figure.supylabel("density per unit of |x|")
    return figure


def _density_panel(axes: Axes, role: str, density: RoleDensity) -> None:
    colour = ROLES.get(role, ("#555555", "."))[0]
    levels = density.levels[density.levels > 0]  # zero has no place on a logarithmic axis
    least = levels.min(initial=np.inf) / SHOWN_BELOW
    seen = density.x >= (least if np.isfinite(least) else density.x[density.x > 0].min())
    for values, dashes in ((density.density, "-"), (density.optimal, "--")):
        drawn = seen & (values > 0)
        axes.plot(density.x[drawn], values[drawn], color=colour, linestyle=dashes)
    curves = np.concatenate([density.density[seen], density.optimal[seen]])
    peak, floor = curves.max(), curves[curves > 0].min()
    axes.set(xscale="log", yscale="log", title=role)
    axes.set_ylim(max(floor / 3, peak * 10.0**-SHOWN_DECADES), peak * 100)  # room for the levels
    axes.vlines(levels, 0.9, 1, color="0.2", linewidth=0.4, transform=axes.get_xaxis_transform())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=5))
    axes.minorticks_off()


def maps(runs: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
    """The maps that per-site tables by title have values for."""
    kinds = {
        "error_per_layer": ("nmse", error_per_layer),
        "spike_rate_per_layer": ("spikes", spike_rate_per_layer),
    }
    drawn = {}
    for kind, (column, draw) in kinds.items():
        if shown := {name: sites for name, sites in runs.items() if sites[column].notna().any()}:
            drawn[kind] = draw(shown)
    return drawn


@rc_context(STYLE)
def error_per_layer(runs: Mapping[str, pd.DataFrame]) -> Figure:
    """Map the error of every role and layer, the geometric mean where a layer has several sites.

    `runs` are per-site tables by title, a panel each; a colour means the same in all of them.
    """
    cells = {}
    for name, sites in runs.items():
        logarithm = np.log(sites["nmse"].where(sites["nmse"] > 0))
        cells[name] = np.exp(logarithm.groupby([sites["role"], sites["layer"]]).mean())
    return _heat_maps(cells, LogNorm(), "NMSE, held-out activations")


@rc_context(STYLE)
def spike_rate_per_layer(runs: Mapping[str, pd.DataFrame]) -> Figure:
    """Map the spikes per value of every role and layer, pooled where a layer has several sites."""
    cells = {}
    for name, sites in runs.items():
        groups = sites.groupby(["role", "layer"])
        cells[name] = groups["spikes"].sum(min_count=1) / groups["values"].sum()
    return _heat_maps(cells, PowerNorm(0.5, vmin=0), "spikes per value")


def _heat_maps(runs: Mapping[str, pd.Series], norm: Normalize, label: str) -> Figure:
    """Draw panels of series indexed by (role, layer), with the values as they are in colour."""
    known = {role for series in runs.values() for role in series.index.unique("role")}
    roles = sorted(known.union(ROLES), key=_order)
    layers = 1 + max(max(series.index.unique("layer"), default=0) for series in runs.values())
    values = np.concatenate([series.to_numpy(float) for series in runs.values()])
    norm.autoscale_None(values[np.isfinite(values)])
    titles = [textwrap.fill(name, 80 // min(len(runs), MAPS_A_ROW)) for name in runs]
    lines = len(roles) + 1 + max(title.count("\n") + 1 for title in titles)
    inches = 0.108 * lines  # a role needs the height of its name
    figure, every = panels(len(runs), MAPS_A_ROW, inches, shared=True)
    holes = []
    for axes, title, series in zip(every, titles, runs.values(), strict=True):
        grid = series.unstack("layer").reindex(index=roles, columns=range(-1, layers))
        holes.append(_heat_map(axes, grid, norm))
        axes.set_title(title, fontsize=7)
    for axes in every[-MAPS_A_ROW:]:
        axes.tick_params(labelbottom=True)  # those that have no panel below
    if np.isfinite(values).any():
        height = min(1, 2 * MAPS_A_ROW / len(runs))
        figure.colorbar(ScalarMappable(norm), ax=every, label=label, shrink=height, pad=0.01)
    figure.supxlabel(noted("layer", "hatched: no value" if any(holes) else ""))
    return figure


def _heat_map(axes: Axes, grid: pd.DataFrame, norm: Normalize) -> bool:
    """Draw a row a role, the head as one bar below them; returns whether a cell has no value."""
    layers = len(grid.columns) - 1  # the first column is the head's
    centres, holes = np.arange(len(grid)) + GAP * (grid.index == HEAD), False
    head = grid.index == HEAD
    for rows, columns in ((~head, slice(1, None)), (head, slice(0, 1))):
        cells = grid.to_numpy(float)[rows, columns]
        edges = np.linspace(-0.5, layers - 0.5, cells.shape[1] + 1)
        borders = np.append(centres[rows] - 0.5, centres[rows][-1] + 0.5)
        masked = np.ma.masked_invalid(cells)
        axes.pcolormesh(edges, borders, masked, norm=norm)
        for row, column in zip(*np.nonzero(masked.mask), strict=True):
            corner = (edges[column], borders[row])
            box = Rectangle(corner, edges[1] - edges[0], 1, facecolor="white", hatch="//////")
            axes.add_patch(box).set(edgecolor="0.6", linewidth=0)
            holes = True
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(centres.max() + 0.5, -0.5))
    axes.set_yticks(centres, grid.index)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[:].set_visible(False)
    axes.grid(False)
    return holes


def _order(role: str) -> tuple[int, str]:
    return (list(ROLES).index(role) if role in ROLES else len(ROLES), role)
