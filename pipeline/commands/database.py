"""`sync` and `relocate`: look after the database of the dashboard."""

from __future__ import annotations

from pathlib import Path

import click

_overrides = click.argument(
    "overrides", nargs=-1, type=click.UNPROCESSED, metavar="[tracking.KEY=VALUE]..."
)


@click.command()
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default="outputs/runs",
    show_default=True,
    metavar="PATH",
    help="The folder of the runs.",
)
@click.option(
    "--close",
    is_flag=True,
    help="Also close sweeps that were killed before their end, and runs whose process is gone.",
)
@_overrides
def sync(runs: Path, close: bool, overrides: tuple[str, ...]) -> int:
    """Log every run that has ended and is not in the database yet.

    tracking.KEY=VALUE changes where: another database, server or experiment.

    \b
    python -m pipeline sync
    python -m pipeline sync --close tracking.uri=http://HOST:5000
    """
    from pipeline.commands import sync
    from pipeline.run.errors import exit_status

    return exit_status(lambda: sync.log_missing(runs, close, overrides), refused=2)


@click.command()
@_overrides
def relocate(overrides: tuple[str, ...]) -> int:
    """Make a database that was moved find its artifacts again.

    MLflow keeps absolute paths. Runs and `make ui` do this by themselves.

    \b
    python -m pipeline relocate
    """
    from pipeline.commands import sync
    from pipeline.run.errors import exit_status

    return exit_status(lambda: sync.relocate_all(overrides), refused=2)
