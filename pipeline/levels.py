"""The density of levels that the codings of a sweep reach at a few typical sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from pipeline.comparisons import SiteLevels, series_names
from pipeline.figures import Array
from stages.codings.coding import Coding, Tokenwise, site_params
from stages.distribution import Densities
from stages.fitting import FittedNeurons

TYPICAL = ("mlp.down", "attn.in", "mlp.act")  # heavy tails, a norm's output, one-sided
SITES = 3
PROBES = 1 << 15
TIMESTEPS = 6  # the T shown is the one nearest to it
GAPS = 32  # a density is averaged over this part of all the gaps between levels


def job_config(folder: Path) -> DictConfig:
    """The configuration of a finished job."""
    config = OmegaConf.load(folder / ".hydra/config.yaml")
    assert isinstance(config, DictConfig)
    return config


def artifact(config: DictConfig, result: Mapping[str, Any], stage: str) -> Path:
    """The folder in the store of a job's artifact."""
    return Path(config.store.path) / stage / result["keys"][stage]


def site_levels(jobs: Mapping[Path, Mapping[str, Any]]) -> tuple[list[SiteLevels], str]:
    """Typical sites of the middle layer with the level density of every coding, and what is shown.

    Of the jobs by folder: those of the first distribution, one a coding. Codings without levels of
    their own, because they scale every token, are left out and named.
    """
    chosen, steps = _chosen(jobs)
    if len(chosen) < 2:
        return [], ""
    first = next(iter(chosen.values()))
    densities = Densities.load(artifact(job_config(first), jobs[first], "distribution"))
    found: dict[str, dict[str, Array]] = {}
    left_out = []
    seen = set()
    for name, folder in chosen.items():
        config, result = job_config(folder), jobs[folder]
        coding: Coding = instantiate(config.coding, _convert_="all")
        if isinstance(coding, Tokenwise):
            left_out.append(name)
        elif coding not in seen:
            seen.add(coding)
            neurons = FittedNeurons.load(artifact(config, result, "fitting"))
            label = name if coding.timesteps == steps else f"{name} (T={coding.timesteps})"
            found[label] = _of_coding(coding, neurons, densities)
    if len(found) < 2:
        return [], ""
    note = f"T = {steps}"
    if left_out:
        note += f"; levels differ from token to token: {', '.join(left_out)}"
    return [_site(index, densities, found) for index in _typical(densities)], note


def _chosen(jobs: Mapping[Path, Mapping[str, Any]]) -> tuple[dict[str, Path], int]:
    """One job of every series: of the T nearest to 6, or of the only T that it has."""
    converted = {f: r for f, r in jobs.items() if "fitting" in r.get("keys", {})}
    if not converted:
        return {}, 0
    source = next(iter(converted.values()))["keys"]["distribution"]
    converted = {f: r for f, r in converted.items() if r["keys"]["distribution"] == source}
    names = dict(zip(converted, series_names(list(converted.values())), strict=True))
    steps: dict[str, set[int]] = {}
    for folder, result in converted.items():
        steps.setdefault(names[folder], set()).add(result["timesteps"])
    swept = [t for each in steps.values() if len(each) > 1 for t in each]
    every = swept or [result["timesteps"] for result in converted.values()]
    nearest = min(every, key=lambda t: (abs(t - TIMESTEPS), t))
    chosen: dict[str, Path] = {}
    for folder, result in converted.items():
        name = names[folder]
        if result["timesteps"] == nearest or steps[name] == {result["timesteps"]}:
            chosen.setdefault(name, folder)
    return chosen, nearest


def _typical(densities: Densities) -> list[int]:
    """Sites of the middle layer, the typical roles first."""
    middle = (max(densities.layers) + 1) // 2
    here = {r: i for i, r in enumerate(densities.roles) if densities.layers[i] == middle}
    roles = sorted(here, key=lambda r: TYPICAL.index(r) if r in TYPICAL else len(TYPICAL))
    return [here[role] for role in roles[:SITES]]


def _of_coding(coding: Coding, neurons: FittedNeurons, densities: Densities) -> dict[str, Array]:
    """Level density of a coding by site, at the sites that it codes."""
    rows = {site: row for row, site in enumerate(neurons.sites)}
    found = {}
    for index in _typical(densities):
        site = densities.sites[index]
        if site in rows:
            params = site_params(neurons.fit.params, rows[site])
            levels = reached(coding, params, float(densities.atoms.maximum[index]))
            found[site] = level_density(levels, _grid(densities))
    return found


def _site(index: int, densities: Densities, found: Mapping[str, Mapping[str, Array]]) -> SiteLevels:
    site = densities.sites[index]
    return SiteLevels(
        f"{densities.roles[index]}, layer {densities.layers[index]}",
        _grid(densities),
        densities.tensors["density"][index].numpy(),
        densities.tensors["optimal"][index].numpy(),
        {name: levels[site] for name, levels in found.items() if site in levels},
    )


def _grid(densities: Densities) -> Array:
    edges = densities.tensors["edges"]
    return np.asarray((edges[1:] * edges[:-1]).sqrt())


def reached(coding: Coding, params: Mapping[str, Tensor], maximum: float) -> Array:
    """The magnitudes that some value up to `maximum` is given, ascending.

    Not the table's: a gated neuron never uses its coarse levels below a finer range.
    """
    even = torch.linspace(0, maximum, PROBES, dtype=torch.float64)
    small = maximum * torch.logspace(-6, 0, PROBES, dtype=torch.float64)
    value, _ = coding.quantise(torch.cat([even, small]).float(), params)
    return np.unique(value[value >= 0].double().numpy())


def level_density(levels: Sequence[float] | Array, x: Array) -> Array:
    """1 / (spacing L) at x for L ascending levels; NaN beyond the largest one.

    The spacing is the mean over L / 32 neighbouring gaps, one at least.
    """
    levels = np.asarray(levels)
    count = len(levels)
    if count < 2:
        return np.full(len(x), np.nan)
    gaps = max(1, count // GAPS)
    below = np.searchsorted(levels, x, side="right") - 1
    start = np.clip(below - (gaps - 1) // 2, 0, count - 1 - gaps)
    density = gaps / (count * (levels[start + gaps] - levels[start]))
    return np.where((x >= levels[0]) & (x <= levels[-1]), density, np.nan)
