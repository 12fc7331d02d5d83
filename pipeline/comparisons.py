"""Figures of perplexity that compare the runs of a sweep, and the looks of its series."""

from __future__ import annotations

import re
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

from pipeline.columns import DIVERGED
from pipeline.figures import STYLE, WIDTH, Array
from pipeline.rows import result_frame, variant

Looks = dict[str, dict[str, Any]]
# A row of panels shows this many series and the others in grey: more cannot be told apart on a
# page. The colours are Okabe and Ito's, safe for colour-blind readers; none tells a series alone.
LOOKS = (
    *(("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^")),
    *(("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "X")),
)
LEVEL: dict[str, Any] = {"marker": "", "linestyle": "-."}  # a series that does not depend on T
DENSE: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 0.9, "marker": ""}
OTHER: dict[str, Any] = {"color": "0.82", "linewidth": 0.7, "marker": "", "zorder": 1}
THIN: dict[str, Any] = {"linewidth": 0.6}  # leads the eye from T to T
FRONT: dict[str, Any] = {"color": "0.6", "linewidth": 3, "alpha": 0.6, "marker": "", "zorder": 1.5}
PANELS_A_ROW = 3
AXES = {"timesteps": "timesteps T", "bits": "bits: T + log$_2$ n of n neurons per activation"}


def comparison_frame(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a run: series, panel (model and transform), timesteps, bits, ppl of the first corpus,
    energy_J (causal, prefill), dense."""
    names = [name for result in results for name in result if name.startswith("ppl_")]
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
    """The variant of every result, with n and the job's settings where a variant has several.

    n = T is no choice of n.
    """
    frame = result_frame(results)
    settings = frame["setting"].fillna("") if "setting" in frame else [""] * len(frame)
    grains: dict[str, set[Any]] = {}
    given: dict[str, set[str]] = {}
    for result, setting in zip(results, settings, strict=True):
        given.setdefault(variant(result), set()).add(setting)
        if result.get("grains") != result.get("timesteps"):
            grains.setdefault(variant(result), set()).add(result.get("grains"))
    found = []
    for result, setting in zip(results, settings, strict=True):
        name = variant(result)
        told = [f"n={result['grains']}"] if len(grains.get(name, ())) > 1 else []
        told += [_short(setting)] if setting and len(given[name]) > 1 else []
        found.append(" ".join([name, *told]))
    return found


def _short(setting: str) -> str:
    """The overrides of a job as a legend has room for: the last part of keys, three digits."""
    keys = re.sub(r"(?:\w+\.)+(\w+=)", r"\1", setting)
    return re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3g}", keys)


def _panel(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
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
    figure, cells = _panels(frame, rows, fixed)
    for axes, runs, own in cells:
        for series, points in runs[~runs["dense"]].groupby("series", sort=False):
            look = own.get(str(series), OTHER)
            if level[series]:
                axes.axhline(points["height"].iloc[0], **look)
            else:
                points = points.sort_values(axis)
                axes.plot(points[axis], points["height"], **look)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel(noted(AXES[axis], _diverged(frame)), fontsize=8)
    return figure


@rc_context(STYLE)
def perplexity_by_energy(frame: pd.DataFrame) -> Figure:
    """Perplexity against energy, with the Pareto front of every panel and T at its points."""
    rows = looks(frame)
    frame = frame.dropna(subset=["ppl", "energy_J"])
    legend = Line2D([], [], **FRONT, label="Pareto front of all, with T")
    figure, cells = _panels(frame, rows, {}, [legend])
    for axes, runs, own in cells:
        axes.margins(0.08)  # for the T beside the points
        front = runs[pareto(runs["energy_J"].to_numpy(), runs["ppl"].to_numpy())]
        front = front.sort_values("energy_J")
        axes.plot(front["energy_J"], front["height"], **FRONT)
        for series, points in runs.groupby("series", sort=False):
            look = own.get(str(series), OTHER | {"linestyle": "", "marker": "."})
            look = {"color": "black", "marker": "*"} if points["dense"].any() else look
            points = points.sort_values("energy_J")
            axes.plot(points["energy_J"], points["height"], **THIN | look)
        for _, run in front[front["series"].isin(list(own))].iterrows():
            axes.annotate(  # below and left of a point of the front there is no other point
                f"{run['timesteps']:.0f}",
                (run["energy_J"], run["height"]),
                (-2, -2),
                textcoords="offset points",
                color=own[run["series"]]["color"],
                fontsize=7,
                ha="right",
                va="top",
            )
    label = "energy of a prefill [J], causal convention"
    figure.supxlabel(noted(label, _diverged(frame)), fontsize=8)
    return figure


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
    dense = frame[frame["dense"]].groupby("panel")["ppl"].first()
    names, present = list(frame["panel"].unique()), set(frame["series"])
    relative = set(names) <= set(dense.index)
    base = frame["panel"].map(dense)
    frame = frame.assign(height=100 * (frame["ppl"] / base - 1) if relative else frame["ppl"])
    drawn = frame[frame["ppl"] <= DIVERGED]
    rows = [{name: look for name, look in row.items() if name in present} for row in rows]
    rows = [row for row in rows if row] or [{}]
    blocks = -(-len(names) // PANELS_A_ROW)  # of panels, in each row of series
    figure = Figure(figsize=(WIDTH, 0.9 + max(2.2, 1.4 * len(rows) * blocks)), layout="constrained")
    columns = min(len(names), PANELS_A_ROW)
    grid = figure.subplots(len(rows) * blocks, columns, squeeze=False, sharex=True, sharey=True)
    cells = []
    for number, row in enumerate(rows):
        block = grid[number * blocks : (number + 1) * blocks]
        for axes, name in zip(block.ravel(), names, strict=False):
            cells.append((axes, drawn[drawn["panel"] == name], row))
            told = [name] if name else []
            told += [f"dense {dense[name]:.4g}"] if name in dense else []
            if number == 0 or blocks > 1:
                axes.set_title(", ".join(told))
            if name in dense:
                axes.axhline(0 if relative else dense[name], **DENSE)
        for axes in block.ravel()[len(names) :]:
            axes.set_axis_off()
        handles = [
            Line2D([], [], **row[name], label=_wrapped(labels.get(name, name))) for name in row
        ]
        block[0, -1].legend(
            handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
        )
    _scale(grid[0, 0], relative)
    handles = [Line2D([], [], **DENSE, label="dense")] if len(dense) else []
    if len(rows) > 1:
        handles.append(Line2D([], [], **OTHER, label="series of the other rows"))
    figure.legend(handles=[*handles, *more], loc="outside upper center", ncols=3, frameon=False)
    figure.supylabel("perplexity over the dense model's" if relative else "perplexity", fontsize=8)
    return figure, cells


def _scale(axes: Axes, relative: bool) -> None:
    """Give the shared vertical axis decades of perplexity, or of percent and linear within 1 %."""
    if relative:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_yticks([-1, 0, *(10.0**k for k in range(6))])
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


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(name, 20))


def noted(label: str, note: str, width: int = 95) -> str:
    """An axis' label with a note below it, broken where the page ends."""
    return "\n".join([label, *textwrap.wrap(note, width)])
