"""`python -m pipeline report NAME`: one page with a study's tables, figures and their origins."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline.commands import page, runs_report
from pipeline.results import naming
from pipeline.results.folders import RunFolder
from pipeline.tables import html, paper
from stages.errors import InputError

if TYPE_CHECKING:
    from pipeline.results.lookup import Row


def main(arguments: Sequence[str]) -> int:
    """Writes the page of study=NAME; returns the exit status, 1 for missing cells and bad input."""
    return paper.status(lambda: _main(arguments))


def of_runs(folders: Sequence[str]) -> int:
    """Writes the page of the runs in these folders; returns the exit status."""
    return paper.status(lambda: runs_report.main(folders))


def _main(arguments: Sequence[str]) -> None:
    name, mine, rest = paper.parted(arguments, "study")
    study = paper.loaded("study", name, mine)
    if any(a.startswith("experiment=") for a in rest):
        raise InputError(f"got experiment=; the experiments of study={name} are in its file")
    command = paper.command("report", "study", arguments)
    if study.fill:
        paper.log_to_terminal()
    tables = {str(table) for chosen in study.experiments.values() for table in chosen}
    if unknown := sorted(tables - set(paper.names("table"))):
        raise InputError(f"got table {unknown[0]}; choose among {', '.join(paper.names('table'))}")
    rows = looked_up(study, rest, command)
    text = render(study, rows, command)
    model = next(iter(rows.values()))[0].run.settings.axes["model"]
    page.write(text, Path(study.folder) / f"{naming.stem(name, [*mine, *rest], model)}.html")


def looked_up(study: Any, overrides: Sequence[str], command: str) -> dict[str, list[Row]]:
    """The rows of every experiment; raises Missing with all that is missing of any."""
    from pipeline.results import lookup

    rows, missing = {}, []
    for experiment in study.experiments:
        try:
            chosen = [f"experiment={experiment}", *overrides]
            rows[str(experiment)] = lookup.rows(chosen, study.fill)
        except lookup.Missing as error:
            missing.append(f"{experiment}: {error}")
    if missing:
        again = [] if study.fill else [f"all at once: {command} study.fill=true"]
        raise lookup.Missing("\n".join([*missing, *again]))
    return rows


def render(study: Any, rows: Mapping[str, Sequence[Row]], command: str) -> str:
    """The page as text."""
    artifacts, environments = paper.origins([row for each in rows.values() for row in each])
    with tempfile.TemporaryDirectory() as place:
        folders = {name: left(each, Path(place, name)) for name, each in rows.items()}
        return page.render(
            title=study.title,
            about=study.about,
            command=command,
            experiments=[
                experiment(name, study.experiments[name], each, folders[name], artifacts)
                for name, each in rows.items()
            ],
            environments=environments,
            folders=[*folders.values()],
        )


def experiment(
    name: str,
    tables: Sequence[str],
    rows: Sequence[Row],
    folder: RunFolder,
    artifacts: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What the page shows of one experiment, whose rows are in `folder` too; `artifacts` are the origins
    of every key."""
    sheets = {f"{name}-{t}": paper.lay_out(paper.loaded("table", t, []), rows) for t in tables}
    names = [row.run.settings.name for row in rows]
    return {
        "name": name,
        "title": name,
        "failed": [],
        "tables": [
            {"name": key, "caption": sheet.caption, "html": html.styled(sheet, key)}
            for key, sheet in sheets.items()
        ],
        "figures": page.pictures(folder),
        **page.differences(names, [row.job.config for row in rows]),
        "rows": [
            {
                "name": row.run.settings.name,
                "command": row.job.command,
                "cost": page.cost(row.result),
                "steps": html.plain(steps(row.result["keys"], artifacts)),
            }
            for row in rows
        ],
    }


def steps(keys: Mapping[str, str], artifacts: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The steps of a run by their artifacts: what each took, when, and from which source it was built."""
    made = {label: artifacts[key] for label, key in keys.items()}
    return pd.DataFrame(
        {
            "step": list(keys),
            "key": list(keys.values()),
            "seconds": [f"{a['seconds']:.1f}" for a in made.values()],
            "built": [a["created"] for a in made.values()],
            "source": [page.revision(a["git"]) for a in made.values()],
            "environment": [str(a["environment"] + 1) for a in made.values()],
        }
    )


def left(rows: Sequence[Row], place: Path) -> RunFolder:
    """A folder with the files that a sweep over these rows leaves."""
    from omegaconf import OmegaConf

    from pipeline.run import neurobench
    from pipeline.run.measured import energy_tables

    for number, row in enumerate(rows):
        job, measured = RunFolder(place / str(number)), row.run.measured
        (job.path / ".hydra").mkdir(parents=True)
        OmegaConf.save(row.job.config, job.path / ".hydra/config.yaml")
        job.leave(row.result, row.sites, energy_tables(measured), neurobench.read(measured))
    return RunFolder(place)


if __name__ == "__main__":
    raise SystemExit("nothing was done: the command is `python -m pipeline report`")
