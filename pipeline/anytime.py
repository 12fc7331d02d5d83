"""What a spiking model is worth before all its steps have passed: a table and a figure of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.columns import DIVERGED
from pipeline.comparisons import LOOKS, comparison_frame
from pipeline.figures import STYLE, WIDTH

CAPTION = (
    "Perplexity on the first corpus where only the spikes of the first `steps` timesteps of every "
    "neuron arrive."
)


def anytime_frame(jobs: Mapping[Path, Mapping[str, Any]]) -> pd.DataFrame:
    """One row a run and number of steps, of the runs with evaluation.anytime: model, transform, run,
    timesteps, steps, ppl."""
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
            }
            for name, result in zip(series, jobs.values(), strict=True)
            for steps, value in result.get("anytime", {}).items()
        ]
    )


@rc_context(STYLE)
def perplexity_by_steps(frame: pd.DataFrame) -> Figure:
    """Perplexity against the steps that have arrived, a line a run; its label tells the steps after
    which the perplexity is beyond what is drawn."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    runs = frame.groupby(["run", "timesteps", "transform"], sort=False)
    for number, ((run, timesteps, transform), points) in enumerate(runs):
        color, marker = LOOKS[number % len(LOOKS)]
        told = "" if transform == "none" else f", {transform}"
        shown = points[points["ppl"] <= DIVERGED]
        label = f"{run}, T={timesteps:.0f}{told}{_beyond(points)}"
        axes.plot(shown["steps"], shown["ppl"], color=color, marker=marker, label=label)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("timesteps whose spikes have arrived")
    axes.set_ylabel("perplexity")
    figure.legend(loc="outside right upper")
    return figure


def _beyond(points: pd.DataFrame) -> str:
    """The steps whose perplexity says only that the model is broken."""
    steps = [str(step) for step in points.loc[points["ppl"] > DIVERGED, "steps"]]
    return f"\nabove {DIVERGED:g} at t = {', '.join(steps)}" if steps else ""
