"""What a spiking model is worth before all its steps have passed: a table and a figure of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.figures.comparisons import ABSOLUTE, LOOKS, comparison_frame
from pipeline.figures.style import BARS, STYLE, WIDTH, noted
from pipeline.results.columns import DIVERGED
from pipeline.results.folders import RunFolder

CAPTION = (
    "Perplexity on the first corpus, ± standard error over windows, where only the spikes of the first "
    "`steps` timesteps of every neuron arrive."
)
DASHES = ("-", "--", ":", "-.")  # where there are more runs than looks
ENTRY = 0.16  # inches of a legend's entry


def anytime_frame(jobs: Mapping[RunFolder, Mapping[str, Any]]) -> pd.DataFrame:
    """One row a run and number of steps, of the runs with evaluation.anytime: model, transform, run,
    timesteps, steps, ppl and its standard error over windows."""
    series = list(comparison_frame(list(jobs.values()))["series"])
    return pd.DataFrame(
        [
            {
                "model": result["model"],
                "transform": result["transform"],
                "run": name,
                "timesteps": result["timesteps"],
                "steps": int(steps),
                "ppl": value,
                "ppl_se": result["anytime_se"][steps],
            }
            for name, result in zip(series, jobs.values(), strict=True)
            for steps, value in result.get("anytime", {}).items()
        ]
    )


@rc_context(STYLE)
def perplexity_by_steps(frame: pd.DataFrame) -> Figure:
    """Perplexity ± standard error against the steps that have arrived, a line a run; a note says what is
    not drawn."""
    runs = frame.groupby(["run", "timesteps", "transform"], sort=False)
    height = max(2.6, 0.4 + ENTRY * len(runs))
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots()
    beyond = []
    for number, ((run, timesteps, transform), points) in enumerate(runs):
        color, marker = LOOKS[number % len(LOOKS)]
        suffix = "" if transform == "none" else f", {transform}"
        shown = points["ppl"] <= DIVERGED
        label, lost = f"{run}, T={timesteps:.0f}{suffix}", points.loc[~shown, "steps"]
        beyond += [f"{label} at t = {', '.join(map(str, lost))}"] if len(lost) else []
        if shown.any():
            x, y, error = (points.loc[shown, name] for name in ("steps", "ppl", "ppl_se"))
            dashes = DASHES[number // len(LOOKS) % len(DASHES)]
            axes.plot(x, y, color=color, marker=marker, linestyle=dashes, label=label)
            axes.errorbar(x, y, error.astype(float), fmt="none", ecolor=color, **BARS)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    note = f"points not drawn, perplexity above {DIVERGED:g}: {'; '.join(beyond)}" if beyond else ""
    axes.set_xlabel(noted("timesteps whose spikes have arrived", note))
    known = frame.loc[frame["ppl"] <= DIVERGED, "ppl_se"].notna().any()
    axes.set_ylabel(ABSOLUTE[0] + ABSOLUTE[1] * bool(known))
    figure.legend(loc="outside right upper")
    return figure


def drawable(frame: pd.DataFrame) -> bool:
    """Whether a run has a perplexity after any of its steps that is worth a point."""
    return bool((frame["ppl"] <= DIVERGED).any())
