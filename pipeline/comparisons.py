"""Figures that compare the runs of a sweep; a series has the same look in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from pipeline.figures import ROLES, SHOWN_DECADES, STYLE, WIDTH, Array
from pipeline.rows import variant
from pipeline.tables import DIVERGED

LOOKS = tuple(ROLES.values())  # colours and markers that tell eleven series apart; then dashes
DASHES = ("-", "--", ":")
CODINGS_A_PANEL = 5
SHOWN_X = 5  # decades of magnitudes, below which the densities are level
AXES = {"timesteps": "timesteps T", "bits": "bits: T + log$_2$ n of n neurons per activation"}


def comparison_frame(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a run: series, panel (model and transform), timesteps, bits, ppl of the first corpus,
    energy_J (causal, prefill), dense."""
    names = [name for result in results for name in result if name.startswith("ppl_")]
    if not names:
        return pd.DataFrame()
    rows = [
        {
            "series": series,
            "panel": _panel(result, results),
            "timesteps": result.get("timesteps"),
            "bits": result.get("bits"),
            "ppl": result.get(names[0]),
            "energy_J": result.get("energy_J"),
            "dense": result["coding"] == "dense",
        }
        for series, result in zip(series_names(results), results, strict=True)
    ]
    numbers = ("timesteps", "bits", "ppl", "energy_J")
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, "float64"))


def series_names(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The variant of every result, with n where a variant has several (n = T is no choice of n)."""
    grains: dict[str, set[Any]] = {}
    for result in results:
        if result.get("grains") != result.get("timesteps"):
            grains.setdefault(variant(result), set()).add(result.get("grains"))
    several = {name for name, counts in grains.items() if len(counts) > 1}
    return [
        f"{name} n={result['grains']}" if name in several else name
        for name, result in zip(map(variant, results), results, strict=True)
    ]


def _panel(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """What the figures keep apart: models and transforms, where there are several."""
    parts = [
        f"{prefix}{result[name]}"
        for name, prefix in (("model", ""), ("transform", "transform "))
        if len({other.get(name) for other in results}) > 1 and result.get(name) is not None
    ]
    return ", ".join(parts)


@rc_context(STYLE)
def perplexity_by(frame: pd.DataFrame, axis: str) -> Figure:
    """Perplexity against `timesteps` or `bits`. A series of one T in all is a level line."""
    drawn, note = _shown(frame.dropna(subset=["ppl"]))
    looks = _looks(frame)
    figure, panels = _panels(frame)
    single = frame.groupby("series")["timesteps"].nunique() < 2
    for name, axes in panels.items():
        for series, rows in drawn[drawn["panel"] == name].groupby("series", sort=False):
            if single[series]:
                look = looks[series] | {"marker": "", "linestyle": "-."}
                axes.axhline(rows["ppl"].iloc[0], **look)
            else:
                rows = rows.sort_values(axis)
                axes.plot(rows[axis], rows["ppl"], **looks[series])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    fixed = {str(s): int(t) for s, t in frame.groupby("series")["timesteps"].max().dropna().items()}
    labels = {s: f"{s} (T={fixed[s]})" for s in looks if single[s] and s in fixed}
    level = {series: {"marker": "", "linestyle": "-."} for series in looks if single[series]}
    _legend(figure, {s: look | level.get(s, {}) for s, look in looks.items()}, labels)
    figure.supxlabel(_lines(AXES[axis], note), fontsize=8)
    return figure


@rc_context(STYLE)
def perplexity_by_energy(frame: pd.DataFrame) -> Figure:
    """Perplexity against energy, with the Pareto front of every panel and T at its points."""
    drawn, note = _shown(frame.dropna(subset=["ppl", "energy_J"]))
    looks = _looks(frame[frame["energy_J"].notna()])
    figure, panels = _panels(frame)
    for name, axes in panels.items():
        rows = drawn[drawn["panel"] == name]
        front = rows[pareto(rows["energy_J"].to_numpy(), rows["ppl"].to_numpy())]
        front = front.sort_values("energy_J")
        axes.plot(front["energy_J"], front["ppl"], color="0.6", linewidth=3, alpha=0.6, zorder=1)
        for series, points in rows.groupby("series", sort=False):
            axes.plot(points["energy_J"], points["ppl"], **looks[series] | {"linestyle": ""})
        for _, row in front[front["timesteps"].notna()].iterrows():
            at = (row["energy_J"], row["ppl"])
            text = f"{row['timesteps']:.0f}"
            axes.annotate(text, at, (0, 5), textcoords="offset points", fontsize=6, ha="center")
    front_line = Line2D([], [], color="0.6", linewidth=3, alpha=0.6, label="Pareto front, with T")
    _legend(figure, {s: look | {"linestyle": ""} for s, look in looks.items()}, {}, [front_line])
    figure.supxlabel(_lines("energy of a prefill [J], causal convention", note), fontsize=8)
    return figure


def pareto(cost: Array, loss: Array) -> np.ndarray:
    """Which points no other point beats: none is as good in both and better in one, [N] bool."""
    as_good = (cost[:, None] <= cost) & (loss[:, None] <= loss)  # [other, point]
    better = (cost[:, None] < cost) | (loss[:, None] < loss)
    return np.asarray(~(as_good & better).any(0))


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


@rc_context(STYLE)
def level_densities(sites: Sequence[SiteLevels], note: str) -> Figure:
    """Rows of sites; in every column p, lambda* and the level densities of a few codings."""
    series = list(dict.fromkeys(name for site in sites for name in site.levels))
    columns = max(1, -(-len(series) // CODINGS_A_PANEL))
    share = -(-len(series) // columns)
    figure = Figure(figsize=(WIDTH, 1.7 * len(sites) + 1.3), layout="constrained")
    grid = figure.subplots(len(sites), columns, squeeze=False, sharex="row", sharey="row")
    for row, site in zip(grid, sites, strict=True):
        row[0].set_ylabel(site.name)
        for column, axes in enumerate(row):
            _levels_panel(axes, site, series[column * share : (column + 1) * share])
    for column, axes in enumerate(grid[-1]):
        handles = [
            Line2D([], [], color=LOOKS[i][0], label=name)
            for i, name in enumerate(series[column * share : (column + 1) * share])
        ]
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    common = [
        Line2D([], [], color="0.65", linewidth=3, label="density p(|x|)"),
        Line2D([], [], color="black", linestyle="--", label="optimal λ* ∝ p$^{1/3}$"),
    ]
    figure.legend(handles=common, loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel(_lines("magnitude |x|", note), fontsize=8)
    figure.supylabel("density per unit of |x|", fontsize=8)
    return figure


def _levels_panel(axes: Axes, site: SiteLevels, series: Sequence[str]) -> None:
    drawn = [site.levels[name] for name in series if name in site.levels]
    peak = max(np.nanmax(values, initial=0) for values in (site.optimal, *drawn))
    axes.plot(site.x, _positive(site.density), color="0.65", linewidth=3)
    axes.plot(site.x, _positive(site.optimal), color="black", linestyle="--", zorder=3)
    for place, ((colour, _), name) in enumerate(zip(LOOKS, series, strict=False)):
        if name in site.levels:  # thinner and thinner, so that equal densities are all seen
            width = 2.6 - 0.45 * place
            axes.plot(site.x, _positive(site.levels[name]), color=colour, linewidth=width)
    axes.set(xscale="log", yscale="log")
    seen = site.x[site.density > 0]
    axes.set_xlim(max(seen[0], seen[-1] * 10.0**-SHOWN_X) / 1.5, seen[-1] * 1.5)
    lowest = np.nanmin(_positive(site.optimal))
    axes.set_ylim(max(lowest / 10, peak * 10.0**-SHOWN_DECADES), peak * 3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=5))
    axes.minorticks_off()


def _positive(values: Array) -> Array:
    return np.where(values > 0, values, np.nan)


def _looks(frame: pd.DataFrame) -> dict[Any, dict[str, Any]]:
    """The colour, marker and line of every series, by its place in the sweep."""
    found: dict[Any, dict[str, Any]] = {}
    for number, series in enumerate(frame.loc[~frame["dense"], "series"].unique()):
        lap, place = divmod(number, len(LOOKS))
        colour, marker = LOOKS[place]
        fill = "white" if lap % 2 else colour
        dashes = DASHES[lap % len(DASHES)]
        found[series] = {"color": colour, "marker": marker, "linestyle": dashes}
        found[series] |= {"markerfacecolor": fill}
    dense = {"color": "0.4", "marker": "_", "linestyle": ":", "markerfacecolor": "0.4"}
    return dict.fromkeys(frame.loc[frame["dense"], "series"].unique(), dense) | found


def _shown(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows with a perplexity that says something, and which series have lost some."""
    diverged = ~(frame["ppl"] <= DIVERGED)
    lost = frame[diverged].groupby("series", sort=False).size()
    if lost.empty:
        return frame, ""
    parts = ", ".join(f"{series} {count}" for series, count in lost.items())
    return frame[~diverged], f"not drawn, perplexity above {DIVERGED:g}: {parts} (rows)"


def _panels(frame: pd.DataFrame) -> tuple[Figure, dict[str, Axes]]:
    names = list(frame["panel"].unique())
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    grid = figure.subplots(1, len(names), squeeze=False, sharex=True, sharey=True)[0]
    for name, axes in zip(names, grid, strict=True):
        axes.set(yscale="log", title=name)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    grid[0].set_ylabel("perplexity")
    return figure, dict(zip(names, grid, strict=True))


def _legend(
    figure: Figure,
    looks: Mapping[Any, Mapping[str, Any]],
    labels: Mapping[Any, str],
    more: Sequence[Line2D] = (),
) -> None:
    handles = [Line2D([], [], **look, label=labels.get(s, s)) for s, look in looks.items()]
    figure.legend(
        handles=[*handles, *more],
        loc="outside upper center",
        ncols=5,
        frameon=False,
        handlelength=3,
    )


def _lines(label: str, note: str, width: int = 110) -> str:
    """An axis' label with a note below it, broken where the page ends."""
    import textwrap

    return "\n".join([label, *textwrap.wrap(note, width)])
