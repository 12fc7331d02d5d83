"""Figures of perplexity that compare the runs of a sweep, and the looks of its series."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from pipeline.figures.style import (
    BARS,
    STYLE,
    WIDTH,
    Array,
    entry,
    legend_above,
    legend_beside,
    noted,
)
from pipeline.results import uncertainty
from pipeline.results.columns import DIVERGED
from pipeline.results.rows import RATIO, measures, result_frame, row_name, short_setting

Looks = dict[str, dict[str, Any]]
# A row of panels shows this many series and the others in grey: more look alike on a
# page. The colours are Okabe and Ito's, safe for colour-blind readers; none tells a series alone.
LOOKS = (
    *(("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^")),
    *(("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "X")),
)
LEVEL: dict[str, Any] = {"marker": "", "linestyle": "-."}  # a series that does not depend on T
DENSE: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 0.9, "marker": ""}
OTHER: dict[str, Any] = {"color": "0.82", "linewidth": 0.7, "marker": "", "zorder": 1}
THIN: dict[str, Any] = {"linewidth": 0.6}  # leads the eye from T to T
BAND: dict[str, Any] = {"alpha": 0.15, "linewidth": 0}
FRONT: dict[str, Any] = {"color": "0.6", "linewidth": 3, "alpha": 0.6, "marker": "", "zorder": 1.5}
PANELS_A_ROW = 3
RELATIVE = ("perplexity over the dense model's", ", 95 % intervals")
ABSOLUTE = ("perplexity", " ± standard error")
AXES = {"timesteps": "timesteps T", "bits": "bits: T + log$_2$ n of n neurons per activation"}


def comparison_frame(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a run: series, panel (model and transform), timesteps, bits, energy_J (causal, prefill),
    dense; of the first corpus ppl with its standard error se, and the bounds low and high of the 95 %
    interval of its ratio to the dense model's."""
    (corpus, *_), _ = measures(name for result in results for name in result)
    rows = [
        {
            "series": series,
            "panel": panel_of(result, results),
            "timesteps": result.get("timesteps"),
            "bits": result.get("bits"),
            "ppl": result.get(f"ppl_{corpus}"),
            "energy_J": result.get("energy_J"),
            "dense": result["coding"] == "dense",
        }
        for series, result in zip(series_names(results), results, strict=True)
    ]
    numbers = ("timesteps", "bits", "ppl", "energy_J")
    frame = pd.DataFrame(rows).astype(dict.fromkeys(numbers, "float64"))
    return frame.assign(**_errors(results, corpus))


def _errors(results: Sequence[Mapping[str, Any]], corpus: str) -> dict[str, pd.Series]:
    """The standard error of a perplexity, and the interval of its ratio to the dense model's."""
    ppl, ratio = f"ppl_{corpus}", RATIO + corpus
    names = [
        ppl,
        f"{ppl}_se",
        f"{ppl}_spread",
        ratio,
        f"{ratio}_low",
        f"{ratio}_high",
        "replicates",
    ]
    rows = [{name: result.get(name) for name in names} for result in results]
    frame = pd.DataFrame(rows, columns=names).astype("float64")
    low, high = uncertainty.interval(frame, ppl, ratio)
    return {"se": frame[f"{ppl}_se"], "low": low, "high": high}


def series_names(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The row of every result, with n and the job's settings where a row has several.

    n = T is no choice of n.
    """
    frame = result_frame(results)
    settings = frame["setting"].fillna("") if "setting" in frame else [""] * len(frame)
    grains: dict[str, set[Any]] = {}
    given: dict[str, set[str]] = {}
    for result, setting in zip(results, settings, strict=True):
        given.setdefault(row_name(result), set()).add(setting)
        if result.get("grains") != result.get("timesteps"):
            grains.setdefault(row_name(result), set()).add(result.get("grains"))
    names = []
    for result, setting in zip(results, settings, strict=True):
        name = row_name(result)
        parts = [f"n={result['grains']}"] if len(grains.get(name, ())) > 1 else []
        parts += [short_setting(setting)] if setting and len(given[name]) > 1 else []
        names.append(" ".join([name, *parts]))
    return names


def panel_of(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """What the figures keep apart: models and transforms, where there are several."""
    parts = [
        f"{prefix}{result[name]}"
        for name, prefix in (("model", ""), ("transform", "transform "))
        if len({other.get(name) for other in results}) > 1 and result.get(name) is not None
    ]
    return ", ".join(parts)


def looks(frame: pd.DataFrame) -> list[Looks]:
    """The series of a sweep in their order, shared out evenly to the rows of a figure."""
    series = frame.loc[~frame["dense"], "series"].unique()
    rows = max(1, -(-len(series) // len(LOOKS)))
    return [
        {str(name): {"color": c, "marker": m} for name, (c, m) in zip(share, LOOKS, strict=False)}
        for share in np.array_split(np.array(series, dtype=object), rows)
    ]


def drawable(frame: pd.DataFrame, axis: str) -> bool:
    """Whether a figure against `axis` has something to compare: runs that did not diverge.

    Against T or bits, a series that moves along it, which codings of a fixed T do not.
    """
    seen = frame[frame["ppl"] <= DIVERGED].dropna(subset=[axis])
    coded = seen[~seen["dense"]]
    if axis in AXES:
        return bool((coded.groupby("series")[axis].nunique() > 1).any())
    return len(coded) > 0 and seen[axis].nunique() > 1


@rc_context(STYLE)
def perplexity_by(frame: pd.DataFrame, axis: str) -> Figure:
    """Perplexity against `timesteps` or `bits`. A series of one T in all is a level line."""
    steps = frame.groupby("series")["timesteps"]
    level = steps.nunique() < 2
    fixed = {
        str(name): f"{name} (T={last:.0f})"
        for name, last in steps.max().dropna().items()
        if level[str(name)]
    }
    rows = [
        {name: look | (LEVEL if level[name] else {}) for name, look in row.items()}
        for row in looks(frame)
    ]
    frame = frame.dropna(subset=["ppl"])
    placed = frame["dense"] | frame["series"].map(level) | frame[axis].notna()
    figure, cells = _panels(frame[placed], rows, fixed)
    for axes, runs, coloured in cells:
        for series, points in runs[~runs["dense"]].groupby("series", sort=False):
            look = coloured.get(str(series), OTHER)
            if level[series]:
                axes.axhline(points["height"].iloc[0], **look)
                axes.axhspan(*points[["lower", "upper"]].iloc[0], color=look["color"], **BAND)
            else:
                points = points.sort_values(axis)
                axes.errorbar(points[axis], points["height"], _bars(points), **look, **BARS)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel(noted(AXES[axis], _diverged(frame)))
    return figure


@rc_context(STYLE)
def perplexity_by_energy(frame: pd.DataFrame) -> Figure:
    """Perplexity against energy, with the Pareto front of every panel and T at its points."""
    rows = looks(frame)
    frame = frame.dropna(subset=["ppl", "energy_J"])
    drawn = frame[frame["ppl"] <= DIVERGED]
    lines = max((len(_front(runs)) for _, runs in drawn.groupby("panel")), default=0) > 1
    legend = entry("Pareto front of all, with T", **FRONT)
    figure, cells = _panels(frame, rows, {}, [legend] * lines)
    for axes, runs, coloured in cells:
        axes.margins(0.08)  # for the T beside the points
        front = _front(runs)
        axes.plot(front["energy_J"], front["height"], **FRONT)
        for series, points in runs.groupby("series", sort=False):
            look = coloured.get(str(series), OTHER | {"linestyle": "", "marker": "."})
            look = {"color": "black", "marker": "*"} if points["dense"].any() else look
            points = points.sort_values("energy_J")
            axes.errorbar(points["energy_J"], points["height"], _bars(points), **BARS | THIN | look)
        for _, run in front[front["series"].isin(list(coloured))].iterrows():
            axes.annotate(  # below and left of a point of the front there is no other point
                f"{run['timesteps']:.0f}",
                (run["energy_J"], run["height"]),
                (-2, -2),
                textcoords="offset points",
                color=coloured[run["series"]]["color"],
                fontsize=7,
                ha="right",
                va="top",
            )
    label = "energy of a prefill [J], causal convention"
    figure.supxlabel(noted(label, _diverged(frame)))
    return figure


def _front(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of a panel that none beats, by energy."""
    front = runs[pareto(runs["energy_J"].to_numpy(), runs["ppl"].to_numpy())]
    return front.sort_values("energy_J")


def pareto(cost: Array, loss: Array) -> np.ndarray:
    """Which points no other point beats: none is as good in both and better in one, [N] bool."""
    as_good = (cost[:, None] <= cost) & (loss[:, None] <= loss)  # [other, point]
    better = (cost[:, None] < cost) | (loss[:, None] < loss)
    return np.asarray(~(as_good & better).any(0))


def _panels(
    frame: pd.DataFrame,
    rows: Sequence[Looks],
    labels: Mapping[Any, str],
    more: Sequence[Line2D] = (),
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame, Looks]]]:
    """Empty axes, each with its runs and the looks of the series that it shows in colour.

    The runs' `height` is the perplexity, or its excess over the dense model's in percent where
    every panel has one: a scale of perplexity tells nothing apart near the dense model.
    """
    drawn, dense, relative = _heights(frame)
    coded = drawn[~drawn["dense"]]
    names, present = list((coded if len(coded) else drawn)["panel"].unique()), set(coded["series"])
    rows = [{name: look for name, look in row.items() if name in present} for row in rows]
    rows = [row for row in rows if row] or [{}]
    columns = min(len(names), PANELS_A_ROW)
    blocks = -(-len(names) // columns)  # of panels, in each row of series
    figure = Figure(figsize=(WIDTH, 0.9 + max(2.2, 1.4 * len(rows) * blocks)))
    grid = figure.subplots(len(rows) * blocks, columns, squeeze=False, sharex=True, sharey=True)
    cells, shown, others = [], np.zeros(grid.shape, bool), False
    for number, row in enumerate(rows):
        last = (0, 0)  # the panel on the right of the first line of panels that this row has
        for place, name in enumerate(names):
            runs = drawn[drawn["panel"] == name]
            series = set(runs.loc[~runs["dense"], "series"])
            if row and not series & set(row):  # it would show series of other rows alone
                continue
            at = (number * blocks + place // columns, place % columns)
            cells.append((grid[at], runs, row))
            others |= not series <= set(row)
            if blocks > 1 or not shown[:, at[1]].any():
                grid[at].set_title(", ".join(filter(None, [name, _dense_title(dense, name)])))
            if name in dense:
                grid[at].axhline(0 if relative else dense[name], **DENSE)
            last = at if not shown[number * blocks :].any() or at[0] == last[0] else last
            shown[at] = True
        names_of_row = {name: textwrap.fill(labels.get(name, name), 20) for name in row}
        legend_beside(grid[last], [entry(names_of_row[name], **row[name]) for name in row])
    _remove(grid, shown)
    _scale(cells[0][0], relative)
    handles = [entry("dense", **DENSE)] if len(dense) else []
    handles += [entry("series of the other rows", **OTHER)] if others else []
    legend_above(figure, [*handles, *more])
    what, bars = RELATIVE if relative else ABSOLUTE
    figure.supylabel(what + bars * bool(drawn["lower"].notna().any()))
    return figure, cells


def _heights(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series, bool]:
    """The runs that did not diverge with their `height` and its bounds, the dense perplexities of the
    panels that have other runs, and whether heights are relative to them.

    Bounds are those of the 95 % interval of a ratio to the dense model, else a standard error away.
    """
    drawn = frame[frame["ppl"] <= DIVERGED]
    names = set((drawn if drawn["dense"].all() else drawn[~drawn["dense"]])["panel"])
    dense = drawn[drawn["dense"] & drawn["panel"].isin(names)].groupby("panel")["ppl"].first()
    relative = names <= set(dense.index)
    base = drawn["panel"].map(dense)
    if relative:
        heights = {"height": drawn["ppl"] / base, "lower": drawn["low"], "upper": drawn["high"]}
        heights = {name: 100 * (value - 1) for name, value in heights.items()}
    else:
        ppl, error = drawn["ppl"], drawn["se"]
        heights = {"height": ppl, "lower": ppl - error, "upper": ppl + error}
    return drawn.assign(**heights), dense, relative


def _bars(points: pd.DataFrame) -> np.ndarray:
    """How far the bounds of points are below and above them, [2, N]; unknown ones are not drawn."""
    ends = [points["height"] - points["lower"], points["upper"] - points["height"]]
    return np.clip(np.array(ends), 0, None)


def _dense_title(dense: pd.Series, name: str) -> str:
    return f"dense {dense[name]:.4g}" if name in dense else ""


def _remove(grid: np.ndarray, shown: np.ndarray) -> None:
    """Remove the panels that show nothing; those that are now outermost have the numbers of the axes."""
    for at in np.argwhere(~shown):
        grid[tuple(at)].remove()
    for row, column in np.argwhere(shown):
        last = not shown[row + 1 :, column].any()
        grid[row, column].tick_params(labelbottom=last, labelleft=not shown[row, :column].any())


def _scale(axes: Axes, relative: bool) -> None:
    """Give the shared vertical axis decades of perplexity, or of percent and linear within 1 %."""
    if relative:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_yticks([-10, -1, 0, *(10.0**k for k in range(6))])
        axes.yaxis.set_major_formatter(lambda percent, _: f"{percent:+g} %" if percent else "0")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())


def _diverged(frame: pd.DataFrame) -> str:
    """Which series have lost points because their perplexity says nothing, and how many."""
    lost = frame[~(frame["ppl"] <= DIVERGED)].groupby("series", sort=False).size()
    parts = ", ".join(f"{series} {count}" for series, count in lost.items())
    return f"points not drawn, perplexity above {DIVERGED:g}: {parts}" if parts else ""
