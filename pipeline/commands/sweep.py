"""The tables and figures of a run beside its main table, for people, the report and the dashboard."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from pipeline.figures import anytime, comparisons, convergence, hardware, levels, sites
from pipeline.figures.kept import Jobs, Kept, comparable
from pipeline.results import naming
from pipeline.results.folders import RunFolder
from pipeline.results.rows import distinct, sweep_results
from pipeline.tables import breakdown, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
MAPS = 24  # as many runs as one page has room for


def draw(folder: RunFolder, name: str, into: Path) -> list[Path]:
    """Write `into`/`name`_* of the results below a run's folder; returns what is written.

    A table of perplexities by step where runs have them; of several runs one of errors by role, one of
    convergence where the surrogate's slope varies, one of errors by quantile where the level
    density's exponent does; figures unless runtime.figures is false.
    """
    results = {job: comparable(each) for job, each in sweep_results(folder.path).items()}
    kept = {id(result) for result in distinct(results.values())}
    jobs = {job: result for job, result in results.items() if id(result) in kept}
    made = {kind: each for kind, each in _tables(jobs).items() if len(each[0])}
    written = []
    for kind, (frame, caption) in made.items():
        written += tables.write(frame, into / f"{name}_{kind}", caption)
    if any(job.config.runtime.figures for job in jobs):
        frames = {kind: frame for kind, (frame, _) in made.items()}
        draw = partial(_figures, jobs, frames)
        written += Kept(jobs, ("png", "pdf")).save(draw, lambda kind: into / f"{name}_{kind}")
    return written


def _tables(jobs: Jobs) -> dict[str, tuple[pd.DataFrame, str]]:
    """Tables beside the main one with their captions; a frame may be empty."""
    made = {"anytime": (anytime.anytime_frame(jobs), anytime.CAPTION)}
    if len(jobs) < 2:
        return made
    curves = convergence.convergence_frame(jobs)
    return made | {
        "convergence": (curves, convergence.caption(curves) if len(curves) else ""),
        "roles": (breakdown.role_frame(jobs), breakdown.ROLES_CAPTION),
        "quantiles": (breakdown.quantile_frame(jobs), breakdown.QUANTILES_CAPTION),
    }


def _figures(jobs: Jobs, frames: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
    """Curves of the tables; of several runs perplexity against whatever has two values at least,
    densities of levels and maps of sites."""
    drawn = {}
    if "anytime" in frames and anytime.drawable(frames["anytime"]):
        drawn["anytime"] = anytime.perplexity_by_steps(frames["anytime"])
    if "convergence" in frames:
        drawn["convergence"] = convergence.limit_by_slope(frames["convergence"])
    if len(jobs) < 2:
        return drawn
    frame = comparisons.comparison_frame(list(jobs.values()))
    for axis in comparisons.AXES:
        if comparisons.drawable(frame, axis):
            drawn[f"ppl_{axis}"] = comparisons.perplexity_by(frame, axis)
    if comparisons.drawable(frame, "energy_J"):
        drawn["ppl_energy"] = comparisons.perplexity_by_energy(frame)
    savings = hardware.saving_frame(list(jobs.values()))
    if hardware.drawable(savings):
        drawn["saving_spikes"] = hardware.saving_by_rate(savings)
        if (bars := hardware.joules_by_part(hardware.part_frame(jobs))) is not None:
            drawn["energy_parts"] = bars
    typical, note = levels.site_levels(jobs)
    if typical:
        drawn["levels"] = levels.level_densities(typical, comparisons.looks(frame), note)
    return drawn | sites.maps(_site_tables(jobs, frame))


def _site_tables(jobs: Jobs, frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The per-site tables of converted jobs, by a title that tells them apart.

    Where a page has no room for all, those of one T and transform.
    """
    frame = frame.set_index(pd.Index(list(jobs), dtype=object))
    shown = frame[~frame["dense"]]
    if len(shown) > MAPS:
        chosen, _ = levels.chosen(jobs)
        shown = shown.loc[list(chosen.values())[:MAPS]]
    several = [name for name in ("timesteps", "panel") if shown[name].nunique() > 1]
    made = {}
    for job, row in shown.iterrows():
        parts = {"timesteps": f" T={row['timesteps']:.0f}", "panel": f", {row['panel']}"}
        made[row["series"] + "".join(parts[name] for name in several)] = job.sites  # type: ignore[attr-defined]
    return made


def job_figures(job: RunFolder) -> list[Path]:
    """The figures of one job, drawn into its folder unless runtime.figures is false."""
    if not job.config.runtime.figures or "fitting" not in job.result["keys"]:
        return []
    (job.path / "figures").mkdir(exist_ok=True)
    kept = Kept({job: job.result}, ("png",))
    return kept.save(partial(sites.pictures, job), lambda kind: job.path / "figures" / kind)


def redrawn(folder: RunFolder, into: Path) -> list[Path]:
    """The tables and figures of a sweep as its end writes them, without those that cannot be drawn."""
    if not folder.finished:
        return []
    name = naming.run_name(folder)
    with redirect_stdout(io.StringIO()):
        tables.sweep_table(folder, name, into)
    try:
        draw(folder, name, into)
    except Exception:
        log.warning("sweep %s is logged without its figures", folder.path.name, exc_info=True)
    return sorted(into.iterdir())
