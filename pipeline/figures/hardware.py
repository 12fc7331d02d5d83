"""Figures of energy under the hardware profiles of a sweep: what is saved at which rate, where joules
go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipeline.figures.comparisons import LOOKS, OTHER, panel_of, series_names
from pipeline.figures.style import STYLE, WIDTH, entry, legend_above, noted, panels
from pipeline.results.folders import RunFolder
from pipeline.results.rows import profiles
from stages.profiles.base import PARTS

# Where a result keeps the sums of the causal convention.
PHASES = {"": "prefill", "decode": "decode"}
# Of the parts.
COLOURS = ("#332288", "#88CCEE", "#44AA99", "#DDCC77", "#CC6677", "#AA4499", "#777777")
LEAST = -2.0  # a saving below this says only that far more is spent
BARS = 12  # rows that one page has room for
FILLED = {"prefill": "full", "decode": "none"}
EVEN: dict[str, Any] = {"color": "0.5", "linestyle": "--", "linewidth": 0.8, "marker": ""}
INTEGERS: dict[str, Any] = {"color": "#117733", "linestyle": ":", "linewidth": 1.0, "marker": ""}


def saving_frame(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row for every run, phase and hardware profile: series phase profile spikes saving
    breakeven dense."""
    names = dict.fromkeys(name for result in results for name in result)
    rows = []
    for series, result in zip(series_names(results), results, strict=True):
        for place, phase in PHASES.items():
            costs = result.get(place, {}) if place else result
            for profile in profiles(names):
                rows.append(
                    {
                        "series": series,
                        "phase": phase,
                        "profile": profile,
                        "spikes": result.get("spikes_per_value"),
                        "saving": costs.get(f"saving_{profile}"),
                        "breakeven": costs.get(f"breakeven_{profile}"),
                        "dense": result["coding"] == "dense",
                    }
                )
    columns = ["series", "phase", "profile", "spikes", "saving", "breakeven", "dense"]
    numbers = dict.fromkeys(("spikes", "saving", "breakeven"), "float64")
    return pd.DataFrame(rows, columns=columns).astype(numbers)


def drawable(frame: pd.DataFrame) -> bool:
    """Whether a spiking run has a saving under several profiles."""
    coded = frame.dropna(subset=["spikes", "saving"])
    return bool(coded["profile"].nunique() > 1)


@rc_context(STYLE)
def saving_by_rate(frame: pd.DataFrame) -> Figure:
    """Saving against spikes a value, a panel a profile; a line at the rate where nothing is saved.

    Full markers are prefills, hollow ones decoded tokens. Integers, which have no spikes, are level lines.
    """
    known = frame.dropna(subset=["saving"])
    coded = known.dropna(subset=["spikes"])
    names = list(dict.fromkeys(coded["profile"]))
    series = list(dict.fromkeys(coded["series"]))
    looks = dict(zip(series, LOOKS, strict=False))  # those beyond are grey
    figure, cells = panels(len(names), 3, 1.6)
    beyond = int((coded["saving"] < LEAST).sum())
    for name, axes in zip(names, cells, strict=True):
        axes.set_title(name)
        axes.axhline(0, color="black", linewidth=0.7)
        own = coded[coded["profile"] == name]
        for phase, runs in own.groupby("phase", sort=False):
            for run in runs.itertuples():
                colour, marker = looks.get(run.series, (OTHER["color"], "."))
                axes.plot(
                    run.spikes,
                    max(run.saving, LEAST),
                    color=colour,
                    marker=marker if run.saving >= LEAST else 7,  # a caret: lies below
                    fillstyle=FILLED[str(phase)],
                    linestyle="",
                )
        even = own[own["phase"] == "prefill"]["breakeven"].dropna()
        ends = sorted({even.min(), even.max()} if len(even) else ())
        for rate in ends:
            axes.axvline(rate, **EVEN)
        if ends:
            axes.set_title(f"{name}: {'–'.join(dict.fromkeys(f'{e:.2f}' for e in ends))}")
        integers = known[known["spikes"].isna() & ~known["dense"] & (known["profile"] == name)]
        for run in integers[integers["phase"] == "prefill"].itertuples():
            axes.axhline(run.saving, **INTEGERS)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.margins(x=0.08)
        axes.set_xlim(left=0)
    handles = [entry(s, color=c, marker=m, linestyle="") for s, (c, m) in looks.items()]
    handles += [entry("others", color=OTHER["color"], marker=".", linestyle="")] * (
        len(series) > len(LOOKS)
    )
    handles += [entry("break-even of prefills", **EVEN)]
    if (known["spikes"].isna() & ~known["dense"]).any():
        handles += [entry("integers, prefill", **INTEGERS)]
    legend_above(figure, handles)
    parts = ["full: prefill, hollow: one decoded token, against the dense model"]
    parts += ["titles: least and most break-even"]
    parts += [f"carets: {beyond} points below {LEAST:.0%}"] if beyond else []
    note = "; ".join(parts)
    figure.supxlabel(noted("spikes a value", note))
    figure.supylabel("energy saved")
    return figure


def part_frame(jobs: Mapping[RunFolder, Mapping[str, Any]]) -> pd.DataFrame:
    """Joules of every run by phase, profile and part, causal convention: series phase profile part J
    share.

    `share` is of what the dense model of the run costs, that of its own workload; NaN where it has no
    energy.
    """
    frames = []
    results = [*jobs.values()]
    steps = [r.get("timesteps") if r.get("spikes_per_value") else None for r in results]
    several = len({t for t in steps if t is not None}) > 1
    for name, t, job in zip(series_names(results), steps, jobs, strict=True):
        result = jobs[job]
        series = f"{name} T={t}" if several and t is not None else name
        if place := panel_of(result, results):
            series = f"{series}, {place}"
        parts = job.parts
        own = parts[(parts["convention"] == "causal") & parts["model"].isna()]
        sums = own.groupby(["phase", "profile", "part"], sort=False)["J"].sum(skipna=False)
        total = sums.groupby(["phase", "profile"]).transform("sum", skipna=False)
        costs = {
            phase: result.get(place, {}) if place else result for place, phase in PHASES.items()
        }
        saved = [costs[phase].get(f"saving_{profile}") for phase, profile, _ in sums.index]
        dense = total / (1 - pd.Series(saved, sums.index, dtype="float64"))
        frames.append(sums.reset_index().assign(series=series, share=(sums / dense).to_numpy()))
    return pd.concat(frames, ignore_index=True)


@rc_context(STYLE)
def joules_by_part(frame: pd.DataFrame) -> Figure | None:
    """Where the joules go: bars of parts, of what the dense model costs, under profiles with several
    parts.

    None for one run, or where no profile has more than one part.
    """
    known = frame.dropna(subset=["share"])
    several = known.groupby("profile")["part"].nunique() > 1
    names = [name for name in dict.fromkeys(known["profile"]) if several[name]]
    series = list(dict.fromkeys(known["series"]))[:BARS]
    if not names or len(series) < 2:
        return None
    phases = list(dict.fromkeys(known["phase"]))
    figure = Figure(figsize=(WIDTH, 0.9 + len(names) * (0.35 + 0.16 * len(series))))
    grid: Any = figure.subplots(len(names), len(phases), squeeze=False, sharex="row", sharey="row")
    for line, name in zip(grid, names, strict=True):
        for axes, phase in zip(line, phases, strict=True):
            own = known[(known["profile"] == name) & (known["phase"] == phase)]
            shares = own.pivot_table("share", "series", "part", "sum").reindex(series).fillna(0.0)
            left = pd.Series(0.0, shares.index)
            for part, colour in zip(PARTS, COLOURS, strict=True):
                if part in shares:
                    axes.barh(shares.index, shares[part], left=left, color=colour, height=0.7)
                    left = left + shares[part]
            axes.axvline(1, color="black", linewidth=0.7)
            axes.set_title(f"{name}, {phase}")
            axes.grid(axis="y", visible=False)
        line[0].invert_yaxis()
    shown = [part for part in PARTS if (known["part"] == part).any()]
    colours = dict(zip(PARTS, COLOURS, strict=True))
    looks = {"linestyle": "", "marker": "s", "markersize": 6}
    legend_above(figure, [entry(part, color=colours[part], **looks) for part in shown])
    lost = known["series"].nunique() - len(series)
    note = f"{lost} more rows are in energy_by_part.csv" if lost else ""
    figure.supxlabel(noted("energy over the dense model's", note))
    return figure
