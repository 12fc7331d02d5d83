"""`store ls|show|verify|gc`: see, check and clean an artifact store."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import click

from pipeline.commands import verbs

_folder = click.option(
    "--store",
    "folder",
    type=click.Path(path_type=Path),
    default="outputs/store",
    show_default=True,
    metavar="PATH",
    help="The folder of the store.",
)


@click.group(cls=verbs.Verbs)
def store() -> None:
    """See, check and clean the store of artifacts.

    \b
    python -m pipeline store ls
    python -m pipeline store gc --older-than 30 --keep quickstart
    """


@store.command()
@_folder
def ls(folder: Path) -> int:
    """List all artifacts with key, size, age and seconds."""
    from pipeline.commands import upkeep

    return upkeep.status(folder, upkeep.ls)


@store.command()
@_folder
@click.argument("key")
def show(folder: Path, key: str) -> int:
    """Print the manifest of an artifact.

    KEY is its key, or the first digits of that.
    """
    from pipeline.commands import upkeep

    return upkeep.status(folder, partial(upkeep.show, key=key))


@store.command()
@_folder
def verify(folder: Path) -> int:
    """Compare every file with the sha256 in its manifest."""
    from pipeline.commands import upkeep

    return upkeep.status(folder, upkeep.verify)


@store.command()
@_folder
@click.option("--older-than", type=float, metavar="DAYS", help="What is younger stays.")
@click.option(
    "--keep-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The artifacts of these keys stay; one key a line.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="EXPERIMENT",
    help="The artifacts of this experiment stay, those of its KEY=VALUE alone where some are given. "
    "Of several, each has its overrides in its quotes: --keep 'codings timesteps=6'.",
)
@click.option("--yes", is_flag=True, help="Delete; without it, only list.")
@verbs.overrides
def gc(
    folder: Path,
    older_than: float | None,
    keep_file: Path | None,
    keep: tuple[str, ...],
    yes: bool,
    overrides: tuple[str, ...],
) -> int:
    """List or delete what is left over and what nothing keeps.

    What an artifact that stays was made from stays too. Without --older-than, --keep-file and --keep only
    what builds have left unfinished goes.

    \b
    python -m pipeline store gc --older-than 30
    python -m pipeline store gc --keep codings transform=none --yes
    """
    if overrides and len(keep) != 1:
        raise click.UsageError(
            f"Got {overrides[0]}: overrides belong to one --keep; quote them with it, "
            f"--keep 'EXPERIMENT {overrides[0]}'."
        )
    from pipeline.commands import upkeep

    experiments = [[*_words(each), *overrides] for each in keep]
    collect = partial(
        upkeep.gc, days=older_than, keep_file=keep_file, experiments=experiments, delete=yes
    )
    return upkeep.status(folder, collect)


def _words(experiment: str) -> list[str]:
    """An experiment and its overrides, out of one argument."""
    try:
        words = shlex.split(experiment)
    except ValueError as error:
        raise click.UsageError(f"--keep {experiment!r} cannot be read: {error}.") from None
    if not words:
        raise click.UsageError("--keep names no experiment.")
    return words
