"""What a sweep leaves beside its table: the figures and the convergence of what it varies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import comparisons, convergence, levels, quantiles, roles, tables
from pipeline.rows import distinct, sweep_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = ("png", "pdf")


def draw(folder: Path, name: str, into: Path) -> list[Path]:
    """Reads the results below a sweep's folder and writes `into`/`name`_*; returns what is written.

    A table of errors by role; one of convergence where the surrogate's slope varies, one of errors
    by quantile where the level density's exponent does; pictures unless runtime.figures is false.
    """
    results = sweep_results(folder)
    kept = {id(result) for result in distinct(results.values())}
    jobs = {job: result for job, result in results.items() if id(result) in kept}
    if len(jobs) < 2:
        return []
    written, pictures = [], {}
    frame = convergence.convergence_frame(jobs)
    if len(frame):
        text = convergence.caption(frame)
        written += tables.write(frame, into / f"{name}_convergence", text)
        pictures["convergence"] = convergence.limit_by_slope(frame)
    by_role = roles.role_frame(jobs)
    if len(by_role):
        written += tables.write(by_role, into / f"{name}_roles", roles.CAPTION)
    by_quantile = quantiles.quantile_frame(jobs)
    if len(by_quantile):
        written += tables.write(by_quantile, into / f"{name}_quantiles", quantiles.CAPTION)
    if not any(levels.job_config(job).runtime.figures for job in jobs):
        return written
    pictures |= _comparisons(jobs)
    for kind, figure in pictures.items():
        written += _save(figure, into / f"{name}_{kind}")
    return written


def _comparisons(jobs: Mapping[Path, Mapping[str, Any]]) -> dict[str, Figure]:
    """Perplexity against whatever has two values at least, and the densities of levels."""
    frame = comparisons.comparison_frame(list(jobs.values()))
    found = {}
    if len(frame):
        # An axis is worth a figure where a series moves along it: codings of fixed T do not.
        moving = frame[~frame["dense"]].groupby("series")
        for axis in comparisons.AXES:
            if frame[axis].notna().any() and (moving[axis].nunique() > 1).any():
                found[f"ppl_{axis}"] = comparisons.perplexity_by(frame, axis)
        if frame["energy_J"].nunique() > 1:
            found["ppl_energy"] = comparisons.perplexity_by_energy(frame)
    sites, note = levels.site_levels(jobs)
    if sites:
        found["levels"] = comparisons.level_densities(sites, note)
    return found


def _save(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as png and pdf, without the date, so that the same figure is the same file."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in SUFFIXES]
    for path in paths:
        dateless = {"CreationDate": None} if path.suffix == ".pdf" else None
        figure.savefig(path, metadata=dateless)
    return paths
