"""`table` and `report`: what a paper shows, from the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.run.shipped import names

_named = click.argument(
    "arguments", nargs=-1, type=click.UNPROCESSED, metavar="NAME [KEY=VALUE]..."
)


@click.command(epilog=f"Tables: {', '.join(names('table'))}.")
@_named
def table(arguments: tuple[str, ...]) -> int:
    """Make a table of a paper from what the store holds.

    \b
    NAME             conf/table/NAME.yaml; table=NAME is the same
    table.KEY=VALUE  an option of that file; table.fill=true runs the jobs that the store lacks
    KEY=VALUE        an override of `run`: experiment=NAME for other axes, timesteps=6 for one
                     value of an axis, store.path=FOLDER

    \b
    python -m pipeline table main experiment=quickstart
    """
    from pipeline.tables import paper

    return paper.main(_keyed("table", arguments))


@click.command(epilog=f"Studies: {', '.join(names('study'))}.")
@click.argument(
    "arguments", nargs=-1, type=click.UNPROCESSED, metavar="NAME [KEY=VALUE]... | FOLDER..."
)
def report(arguments: tuple[str, ...]) -> int:
    """Make a page to explore of a study or of runs.

    Figures with filters, tables, configurations and origins, in one file that needs no network.

    \b
    NAME             conf/study/NAME.yaml; study=NAME is the same
    study.KEY=VALUE  an option of that file; study.fill=true runs the jobs that the store lacks
    KEY=VALUE        an override of `run`, for every experiment of the study
    FOLDER           of a run or of one of its jobs, as outputs/runs/ID; several make one page

    \b
    python -m pipeline report quickstart
    python -m pipeline report outputs/runs/ID
    """
    from pipeline.commands import report

    first = next(iter(arguments), "")
    a_path = "/" in first and "=" not in first
    if first and first not in names("study") and (a_path or Path(first).is_dir()):
        return report.of_runs(arguments)
    return report.main(_keyed("study", arguments))


def _keyed(group: str, arguments: Sequence[str]) -> list[str]:
    """The arguments with a name that comes first as `group`=NAME."""
    first, rest = list(arguments[:1]), arguments[1:]
    return [*(word if "=" in word else f"{group}={word}" for word in first), *rest]
