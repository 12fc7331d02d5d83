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
from pipeline.tables import html, tables
from stages.errors import InputError

REPORTS = Path("outputs/reports")


def main(arguments: Sequence[str]) -> None:
    """Write the page of the runs in these folders; InputError where one is none."""
    if other := [word for word in arguments if not Path(word).is_dir()]:
        raise InputError(
            f"got {other[0]}; a report of runs takes their folders alone, as outputs/runs/ID"
        )
    folders = [RunFolder(Path(word)) for word in dict.fromkeys(arguments)]
    empty = [folder for folder in folders if not folder.finished]
    if len(empty) == len(folders):
        raise InputError(f"no job below {empty[0].path} has left a result.json: see the jobs' logs")
    for folder in empty:
        print(f"left out, for no job of it has left a result: {folder.path}")
    folders = [folder for folder in folders if folder not in empty]
    names = [f"{naming.run_name(f)}_{f.path.resolve().name}" for f in folders]
    text = page.render(
        title=", ".join(naming.run_name(folder) for folder in folders),
        about=_about(folders),
        command=shlex.join(["python", "-m", "pipeline", "report", *arguments]),
        experiments=[section(f"run-{n}", folder) for n, folder in enumerate(folders, 1)],
        environments=_environments(folders),
        folders=folders,
    )
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    stem = names[0] if len(names) == 1 else f"runs_{digest}"
    page.write(text, REPORTS / f"{stem}.html")


def _about(folders: Sequence[RunFolder]) -> str:
    """How many rows there are of which folders, and what failed."""
    said = []
    for folder in folders:
        failed = [f"{' '.join(f['overrides'])}: {f['error']}" for f in folder.failures]
        lines = f"; failed: {'; '.join(failed)}" if failed else ""
        said.append(f"{len(folder.finished)} jobs of {folder.path}{lines}.")
    return " ".join(said)


def section(name: str, folder: RunFolder) -> dict[str, Any]:
    """What the page shows of one run's folder: its table, its figures, and how to repeat its rows."""
    results = sweep_results(folder.path)
    kept = {id(each) for each in distinct(results.values())}
    shown = {job: each for job, each in results.items() if id(each) in kept}
    config: Any = OmegaConf.to_container(folder.finished[0].config)
    sheet = tables.run_sheet([*shown.values()], config["table"]["columns"], config["energy"])
    labels = [result["label"] for result in shown.values()]
    return {
        "name": name,
        "title": f"{naming.run_name(folder)} {folder.path.resolve().name}",
        "tables": [
            {
                "name": f"{name}-table",
                "caption": sheet.caption,
                "html": html.styled(sheet, f"{name}-table"),
            }
        ],
        "figures": _pictures(folder),
        **page.differences(labels, [job.config for job in shown]),
        "rows": [
            {
                "name": result["label"],
                "command": jobs.command(result["run"]["overrides"]),
                "cost": page.cost(result),
                "steps": html.plain(_steps(result)),
            }
            for result in shown.values()
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
