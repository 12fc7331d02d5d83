"""What a sweep leaves beside its table: the figures and the convergence of what it varies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from omegaconf import OmegaConf

from pipeline.figures import anytime, comparisons, convergence, figures, levels, quantiles, roles
from pipeline.results import naming
from pipeline.results.rows import distinct, sweep_results
from pipeline.tables import tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAPS = 24  # as many runs as one page has room for


def experiment(folder: Path) -> str | None:
    """The experiment that a sweep's folder is of, if one was chosen; None for a single run."""
    choice = folder / "multirun.yaml"
    if not choice.exists():
        return None
    name = OmegaConf.load(choice).hydra.runtime.choices.experiment
    return None if name in (None, "none") else str(name)


def name(folder: Path) -> str:
    """What the tables and figures of a run are called: after its experiment, or else what was asked.

    That is its row's name, or its model, coding, T and n, or the axes of a sweep.
    """
    of, first = experiment(folder), next(iter(sweep_results(folder).values()))
    swept = folder / "multirun.yaml"
    if not swept.exists():
        return naming.run_stem(first, (first.get("run") or {}).get("overrides", ()), swept=False)
    told = list(map(str, OmegaConf.load(swept).hydra.overrides.task))
    if of is None:
        return naming.run_stem(first, told, swept=True)
    return naming.stem(of, told, first["model"])


def draw(folder: Path, name: str, into: Path) -> list[Path]:
    """Reads the results below a sweep's folder and writes `into`/`name`_*; returns what is written.

    A table of perplexities by step where runs have them; of several runs one of errors by role, one of
    convergence where the surrogate's slope varies, one of errors by quantile where the level
    density's exponent does; pictures unless runtime.figures is false.
    """
    results = sweep_results(folder)
    kept = {id(result) for result in distinct(results.values())}
    jobs = {job: result for job, result in results.items() if id(result) in kept}
    found = {kind: told for kind, told in _tables(jobs).items() if len(told[0])}
    written = []
    for kind, (frame, caption) in found.items():
        written += tables.write(frame, into / f"{name}_{kind}", caption)
    if not any(levels.job_config(job).runtime.figures for job in jobs):
        return written
    pictures = {}
    if "anytime" in found and anytime.drawable(found["anytime"][0]):
        pictures["anytime"] = anytime.perplexity_by_steps(found["anytime"][0])
    if "convergence" in found:
        pictures["convergence"] = convergence.limit_by_slope(found["convergence"][0])
    if len(jobs) > 1:
        pictures |= _comparisons(jobs)
    for kind, figure in pictures.items():
        written += figures.save(figure, into / f"{name}_{kind}")
    return written


def _tables(jobs: Mapping[Path, Mapping[str, Any]]) -> dict[str, tuple[pd.DataFrame, str]]:
    """What is told of jobs beside their rows, and its caption; a frame may be empty."""
    found = {"anytime": (anytime.anytime_frame(jobs), anytime.CAPTION)}
    if len(jobs) < 2:
        return found
    curves = convergence.convergence_frame(jobs)
    return found | {
        "convergence": (curves, convergence.caption(curves) if len(curves) else ""),
        "roles": (roles.role_frame(jobs), roles.CAPTION),
        "quantiles": (quantiles.quantile_frame(jobs), quantiles.CAPTION),
    }


def _comparisons(jobs: Mapping[Path, Mapping[str, Any]]) -> dict[str, Figure]:
    """Perplexity against whatever has two values at least, densities of levels, maps of sites."""
    frame = comparisons.comparison_frame(list(jobs.values()))
    found = {}
    for axis in comparisons.AXES:
        if comparisons.drawable(frame, axis):
            found[f"ppl_{axis}"] = comparisons.perplexity_by(frame, axis)
    if comparisons.drawable(frame, "energy_J"):
        found["ppl_energy"] = comparisons.perplexity_by_energy(frame)
    sites, note = levels.site_levels(jobs)
    if sites:
        found["levels"] = levels.level_densities(sites, comparisons.looks(frame), note)
    maps = site_tables(jobs)
    for kind, column, drawn in (
        ("error_per_layer", "nmse", figures.error_per_layer),
        ("spike_rate_per_layer", "spikes", figures.spike_rate_per_layer),
    ):
        if shown := {name: sites for name, sites in maps.items() if sites[column].notna().any()}:
            found[kind] = drawn(shown)
    return found


def site_tables(jobs: Mapping[Path, Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
    """The per-site tables of converted jobs, by a title that tells them apart.

    Where a page has no room for all, those of one T and transform.
    """
    frame = comparisons.comparison_frame(list(jobs.values())).set_index(pd.Index(jobs))
    shown = frame[~frame["dense"]]
    if len(shown) > MAPS:
        chosen, _ = levels.chosen(jobs)
        shown = shown.loc[list(chosen.values())[:MAPS]]
    told = [name for name in ("timesteps", "panel") if shown[name].nunique() > 1]
    found = {}
    for folder, row in shown.iterrows():
        parts = {"timesteps": f" T={row['timesteps']:.0f}", "panel": f", {row['panel']}"}
        title = row["series"] + "".join(parts[name] for name in told)
        found[title] = pd.read_parquet(Path(str(folder)) / "per_site.parquet")
    return found
