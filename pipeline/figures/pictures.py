"""The pictures of one finished run, from its artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from pipeline.figures import figures
from stages.codings.base import Coding, site_params
from stages.distribution import Densities
from stages.fitted import FittedNeurons

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    name: str, coding: Coding, sites: pd.DataFrame, densities: Path, neurons: Path
) -> dict[str, Figure]:
    """Density with levels, error by layer and spike rate by layer, as far as the coding has them.

    `sites` is the per-site table, `densities` and `neurons` are the folders of the distribution and
    of the fitting.
    """
    pictures = {"error_per_layer": figures.error_per_layer({name: sites})}
    if not coding.tokenwise:  # those have other levels in every token
        shown = role_densities(coding, Densities.load(densities), FittedNeurons.load(neurons))
        pictures["density_and_levels"] = figures.density_with_levels(shown)
    if coding.neuron:
        pictures["spike_rate_per_layer"] = figures.spike_rate_per_layer({name: sites})
    return pictures


def role_densities(
    coding: Coding, densities: Densities, neurons: FittedNeurons
) -> dict[str, figures.RoleDensity]:
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
            shown[role] = figures.RoleDensity(
                x,
                densities.tensors["density"][index].numpy(),
                densities.tensors["optimal"][index].numpy(),
                levels.numpy(),
            )
    return shown
