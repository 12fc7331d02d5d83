"""Draw the figures of one run; a role has the same colour and marker in all of them."""

import logging
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

WIDTH = 5.5  # inches, the text width of a page of ICLR and NeurIPS
COLUMNS = 3
MAPS_A_ROW = 4
MAP = "viridis"  # rises in lightness alone, so it is read in grey and by every eye
HEAD = "head.in"
GAP = 0.4  # between the layers' roles and the head
SHOWN_DECADES = 10  # a density is drawn this far below its peak
SHOWN_BELOW = 100  # and magnitudes down to this part of the smallest level: below, it is flat
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "figure.dpi": 200,
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,  # TrueType: journals refuse matplotlib's default, type 3
}
# Paul Tol's "muted" scheme, its pale grey darkened, and black: safe for colour-blind readers
ROLES = {
    "attn.in": ("#332288", "o"),
    "attn.q": ("#88CCEE", "s"),
    "attn.k": ("#44AA99", "^"),
    "attn.v": ("#117733", "v"),
    "attn.probs": ("#999933", "D"),
    "attn.out": ("#DDCC77", "P"),
    "mlp.in": ("#CC6677", "X"),
    "mlp.act": ("#882255", "<"),
    "mlp.up": ("#AA4499", ">"),
    "mlp.down": ("#777777", "*"),
    "head.in": ("#000000", "h"),
}
Array = NDArray[np.float64]


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


@rc_context(STYLE)
def density_with_levels(roles: Mapping[str, RoleDensity]) -> Figure:
    """Draw, one panel per role, the density of magnitudes, the optimal one and the levels."""
    columns = min(len(roles), COLUMNS)
    rows = -(-len(roles) // columns)
    figure = Figure(figsize=(WIDTH, 1.6 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for role, axes in zip(sorted(roles, key=_order), panels, strict=False):
        _density_panel(axes, role, roles[role])
    for axes in panels[len(roles) :]:
        axes.remove()
    legend = [
        Line2D([], [], color="0.3", label="density p(|x|)"),
        Line2D([], [], color="0.3", linestyle="--", label="optimal density λ* ∝ p$^{1/3}$"),
    ]
    if any((density.levels > 0).any() for density in roles.values()):
        tick = Line2D([], [], color="0.3", marker="|", linestyle="", markersize=8)
        tick.set_label("levels > 0")
        legend.append(tick)
    figure.legend(handles=legend, loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("magnitude |x|", fontsize=8)
    figure.supylabel("density per unit of |x|", fontsize=8)
    return figure


def _density_panel(axes: Axes, role: str, density: RoleDensity) -> None:
    colour = _appearance(role)[0]
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
    found = {role for series in runs.values() for role in series.index.unique("role")}
    roles = sorted(found.union(ROLES), key=_order)
    layers = 1 + max(max(series.index.unique("layer"), default=0) for series in runs.values())
    values = np.concatenate([series.to_numpy(float) for series in runs.values()])
    norm.autoscale_None(values[np.isfinite(values)])
    columns = min(len(runs), MAPS_A_ROW)
    rows = -(-len(runs) // columns)
    titles = [textwrap.fill(name, 80 // columns) for name in runs]
    lines = len(roles) + 1 + max(title.count("\n") + 1 for title in titles)
    inches = 0.108 * lines  # a role needs the height of its name
    figure = Figure(figsize=(WIDTH, 0.5 + rows * inches), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    holes = []
    for axes, title, series in zip(panels, titles, runs.values(), strict=False):
        grid = series.unstack("layer").reindex(index=roles, columns=range(-1, layers))
        holes.append(_heat_map(axes, grid, norm))
        axes.set_title(title, fontsize=7)
    for axes in panels[len(runs) :]:
        axes.remove()
    for axes in panels[max(0, len(runs) - columns) : len(runs)]:
        axes.tick_params(labelbottom=True)  # those that have no panel below
    if np.isfinite(values).any():
        colours = ScalarMappable(norm, MAP)
        figure.colorbar(
            colours, ax=list(panels[: len(runs)]), label=label, shrink=min(1, 2 / rows), pad=0.01
        )
    figure.supxlabel(noted("layer", "hatched: no value" if any(holes) else ""), fontsize=8)
    return figure


def _heat_map(axes: Axes, grid: pd.DataFrame, norm: Normalize) -> bool:
    """Draw a row a role, the head as one bar below them; returns whether a cell has no value."""
    layers = len(grid.columns) - 1  # the first column is the head's
    centres, holes = np.arange(len(grid)) + GAP * (grid.index == HEAD), False
    head = grid.index == HEAD
    for rows, columns in ((~head, slice(1, None)), (head, slice(0, 1))):
        cells = grid.to_numpy(float)[rows, columns]
        edges = np.linspace(-0.5, layers - 0.5, cells.shape[1] + 1)
        shown = np.isfinite(cells)
        for row, column in zip(*np.nonzero(~shown), strict=True):
            corner = (edges[column], centres[rows][row] - 0.5)
            box = Rectangle(corner, edges[1] - edges[0], 1, facecolor="white", hatch="//////")
            axes.add_patch(box).set(edgecolor="0.6", linewidth=0)
            holes = True
        borders = np.append(centres[rows] - 0.5, centres[rows][-1] + 0.5)
        masked = np.ma.masked_array(cells, ~shown)
        axes.pcolormesh(edges, borders, masked, norm=norm, cmap=MAP)
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(centres.max() + 0.5, -0.5))
    axes.set_yticks(centres, grid.index)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[:].set_visible(False)
    axes.grid(False)
    return holes


def noted(label: str, note: str, width: int = 95) -> str:
    """An axis' label with a note below it, broken where the page ends."""
    return "\n".join([label, *textwrap.wrap(note, width)])


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write stem.png and stem.pdf with embedded fonts; the same figure gives the same bytes."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "pdf")]
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # a line for each table of each font
    with rc_context(STYLE):  # the type of the fonts is decided when a file is written
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # both have the layout that has just been found
        for path in paths:
            figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    return paths


def _order(role: str) -> tuple[int, str]:
    return (list(ROLES).index(role) if role in ROLES else len(ROLES), role)


def _appearance(role: str) -> tuple[str, str]:
    return ROLES.get(role, ("#555555", "."))
