"""What a finished run shows: its pictures, and its entry in the tracking database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline import figures, tracking
from pipeline.settings import Settings
from stages.codings.coding import Coding, Tokenwise, site_params
from stages.distribution import Densities
from stages.fitting import FittedNeurons

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipeline.runner import Run


def track(
    settings: Settings,
    result: dict[str, Any],
    sites: pd.DataFrame,
    run: Run,
    config_yaml: str,
    parent_run_id: str | None,
) -> None:
    """Logs a run with its per-site table and pictures; a failure is a warning."""
    pictures = draw(run, sites) if settings.runtime.figures else {}
    git = result["run"]["git"]
    tags = {
        "sweep": result["run"]["id"],
        "git.revision": str(git["revision"]),
        "git.dirty": str(git["dirty"]),
    }
    logged = {k: v for k, v in result.items() if k not in ("run", "axes", "evaluation", "label")}
    for name, metrics in result["evaluation"].items():
        tags |= {f"{name}.{k}": str(v) for k, v in metrics.items() if k != "perplexity"}
    tracking.log_run(
        settings.tracking,
        name=settings.name,
        result=logged,
        axes=settings.axes,
        per_site=sites,
        figures=pictures,
        config_yaml=config_yaml,
        tags=tags,
        parent_run_id=parent_run_id,
    )


def draw(run: Run, sites: pd.DataFrame) -> dict[str, Figure]:
    """Density with levels, error by layer and spike rate by layer; none for the dense model."""
    if "fitting" not in run.artifacts:
        return {}
    coding: Coding = run.settings.coding  # type: ignore[assignment]
    pictures = {"error_per_layer": figures.error_per_layer(sites)}
    if not isinstance(coding, Tokenwise):  # those have other levels in every token
        shown = role_densities(run, coding)
        pictures["density_and_levels"] = figures.density_with_levels(shown)
    if coding.neuron:
        pictures["spike_rate_per_layer"] = figures.spike_rate_per_layer(sites)
    return pictures


def role_densities(run: Run, coding: Coding) -> dict[str, figures.RoleDensity]:
    """The middle layer's density of every role, and the levels of the neuron fitted to it."""
    densities = Densities.load(run.artifacts["distribution"].path)
    neurons = FittedNeurons.load(run.artifacts["fitting"].path)
    edges = densities.tensors["edges"]
    x = (edges[1:] * edges[:-1]).sqrt().numpy()
    middle = (max(densities.layers) + 1) // 2
    shown = {}
    rows = {site: row for row, site in enumerate(neurons.sites)}
    for index, site in enumerate(densities.sites):
        role, layer = densities.roles[index], densities.layers[index]
        if layer in (middle, -1) and site in rows:
            levels = coding.table(site_params(neurons.fit.params, rows[site])).double()
            shown[role] = figures.RoleDensity(
                x,
                densities.tensors["density"][index].numpy(),
                densities.tensors["optimal"][index].numpy(),
                levels.numpy(),
            )
    return shown
