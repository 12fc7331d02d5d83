"""`python -m pipeline report FOLDER ...`: one page of the runs in these folders, from their files."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from pipeline.commands import page
from pipeline.results import naming
from pipeline.results.folders import RunFolder
from pipeline.results.rows import distinct, sweep_results
from pipeline.run import jobs
from pipeline.run.overrides import shown
from pipeline.tables import html, tables
from stages.errors import InputError

REPORTS = Path("outputs/reports")


def main(arguments: Sequence[str]) -> None:
    """Write the page of the runs in these folders; InputError where one is none."""
    if other := [word for word in arguments if not Path(word).is_dir()]:
        raise InputError(
            f"{other[0]} is no folder; a report of runs takes their folders alone, as outputs/runs/ID"
        )
    folders = [RunFolder(Path(word)) for word in dict.fromkeys(arguments)]
    empty = [folder for folder in folders if not folder.finished]
    if len(empty) == len(folders):
        raise InputError(f"no job below {empty[0].path} has left a result.json: see the jobs' logs")
    for folder in empty:
        print(f"left out, for no job of it has left a result: {folder.path}")
    folders = [folder for folder in folders if folder not in empty]
    names = [f"{naming.run_name(folder)}_{_place(folder)}" for folder in folders]
    count = sum(len(folder.finished) for folder in folders)
    text = page.render(
        title=names[0] if len(names) == 1 else f"{len(names)} runs",
        about=f"What {count} jobs have measured." if count > 1 else "What one job has measured.",
        command=shlex.join(["python", "-m", "pipeline", "report", *arguments]),
        experiments=[section(f"run-{n}", folder) for n, folder in enumerate(folders, 1)],
        environments=_environments(folders),
        folders=folders,
    )
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    page.write(text, REPORTS / f"{names[0] if len(names) == 1 else f'runs_{digest}'}.html")


def _place(folder: RunFolder) -> str:
    """The name of a run's folder; of that of a job in a run with its number."""
    path = folder.path.resolve()
    return f"{path.parent.name}_{path.name}" if folder.jobs == [folder] else path.name


def section(name: str, folder: RunFolder) -> dict[str, Any]:
    """What the page shows of one run's folder: its table, its figures, and how to repeat its rows."""
    results = sweep_results(folder.path)
    kept = {id(each) for each in distinct(results.values())}
    rows = {job: each for job, each in results.items() if id(each) in kept}
    config: Any = OmegaConf.to_container(folder.finished[0].config)
    sheet = tables.run_sheet([*rows.values()], config["table"]["columns"], config["energy"])
    labels = [result["label"] for result in rows.values()]
    return {
        "name": name,
        "title": f"{naming.run_name(folder)} {_place(folder)}",
        "failed": [f"{' '.join(shown(f['overrides']))}: {f['error']}" for f in folder.failures],
        "tables": [
            {
                "name": f"{name}-table",
                "caption": sheet.caption,
                "html": html.styled(sheet, f"{name}-table"),
            }
        ],
        "figures": _pictures(folder),
        **page.differences(labels, [job.config for job in rows]),
        "rows": [
            {
                "name": result["label"],
                "command": jobs.command(result["run"]["overrides"]),
                "cost": page.cost(result),
                "steps": html.plain(_steps(result)),
            }
            for result in rows.values()
        ],
    }


def _pictures(folder: RunFolder) -> list[dict[str, str]]:
    """The figures of a run; none, which is said, where the store no longer has what they show."""
    try:
        return page.pictures(folder)
    except OSError as error:
        why = f"{error.filename} is gone; the same command as before makes it again"
        print(f"without the pictures of {folder.path}: {why}")
        return []


def _steps(result: Mapping[str, Any]) -> pd.DataFrame:
    """The steps of a job by their artifacts, and what each took when it was made."""
    return pd.DataFrame(
        {
            "step": list(result["keys"]),
            "key": list(result["keys"].values()),
            "seconds": [f"{result['seconds'][label]:.1f}" for label in result["keys"]],
        }
    )


def _environments(folders: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """The versions and machines that have run jobs."""
    runs = [job.result["run"] for folder in folders for job in folder.finished]
    kept: list[dict[str, Any]] = []
    for run in runs:
        if (one := {name: run[name] for name in ("versions", "machine")}) not in kept:
            kept.append(one)
    return kept
