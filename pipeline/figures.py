"""Draw the figures of one run; a role has the same colour and marker in all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

WIDTH = 7.0  # inches, the text width of a page
COLUMNS = 3
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
    rows = len(roles) // COLUMNS + 1  # at least one panel is left for the legend
    figure = Figure(figsize=(WIDTH, 1.6 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for role, axes in zip(sorted(roles, key=_order), panels, strict=False):
        _density_panel(axes, role, roles[role])
    for axes in panels[len(roles) :]:
        axes.set_axis_off()
    legend = [
        Line2D([], [], color="0.3", label="density p(|x|)"),
        Line2D([], [], color="0.3", linestyle="--", label="optimal density λ* ∝ p$^{1/3}$"),
        Line2D([], [], color="0.3", marker="|", linestyle="", markersize=8, label="levels > 0"),
    ]
    panels[len(roles)].legend(handles=legend, loc="center", frameon=False)
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
def error_per_layer(per_site: pd.DataFrame) -> Figure:
    """Draw the error of each role by layer, the geometric mean where a layer has several sites."""
    logarithm = np.log(per_site["nmse"].where(per_site["nmse"] > 0))
    error = np.exp(logarithm.groupby([per_site["role"], per_site["layer"]]).mean())
    figure, axes = _by_layer(error)
    axes.set(title="Conversion error on held-out activations", ylabel="NMSE", yscale="log")
    return figure


@rc_context(STYLE)
def spike_rate_per_layer(per_site: pd.DataFrame) -> Figure:
    """Draw the spikes per value of each role by layer, pooled where a layer has several sites."""
    sums = per_site.groupby(["role", "layer"])[["spikes", "values"]].sum()
    figure, axes = _by_layer(sums["spikes"] / sums["values"])
    axes.set(title="Spike rate", ylabel="spikes per value")
    axes.set_ylim(bottom=0)
    return figure


def _by_layer(series: pd.Series) -> tuple[Figure, Axes]:
    """Draw a series indexed by (role, layer); the head, layer -1, comes after the last layer."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    series = series[np.isfinite(series)]
    layers = series.index.get_level_values("layer")
    head = max(layers, default=0) + 1
    for role in sorted(series.index.unique("role"), key=_order):
        line = series[role]
        colour, marker = _appearance(role)
        dashes = "--" if role.startswith("mlp.") else "-"
        x = [layer if layer >= 0 else head for layer in line.index]
        axes.plot(x, line, color=colour, marker=marker, linestyle=dashes, label=role)
    if series.empty:
        axes.text(0.5, 0.5, "undefined for this run", ha="center", transform=axes.transAxes)
    else:
        figure.legend(loc="outside right center", frameon=False, handlelength=3)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if -1 in layers:
        ticks = [tick for tick in axes.get_xticks() if 0 <= tick < head - 0.5]
        axes.set_xticks([*ticks, head], [*(f"{tick:.0f}" for tick in ticks), "head"])
    return figure, axes


def _order(role: str) -> tuple[int, str]:
    return (list(ROLES).index(role) if role in ROLES else len(ROLES), role)


def _appearance(role: str) -> tuple[str, str]:
    return ROLES.get(role, ("#555555", "."))
