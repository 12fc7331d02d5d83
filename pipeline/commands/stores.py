"""`store ls|show|verify|push|gc`: see, check and clean an artifact store."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from pipeline.commands import verbs

_path = click.option(
    "--store",
    "path",
    default="outputs/store",
    show_default=True,
    metavar="PATH",
    help="The folder of the store, or its address, s3://BUCKET/FOLDER.",
)
_cache = click.option(
    "--cache",
    default="outputs/cache",
    show_default=True,
    metavar="FOLDER",
    help="The folder in front of an address.",
)
_lock = click.option("--lock", default="auto", show_default=True, help="As store.lock of runs.")


def _store(command: Callable[..., int]) -> Callable[..., int]:
    """The options that say which store: `spec` of the command."""

    @functools.wraps(command)
    def called(path: str, cache: str, lock: str, **options: Any) -> int:
        return command(spec={"path": path, "cache": cache, "lock": lock}, **options)

    return _path(_cache(_lock(called)))


@click.group(cls=verbs.Verbs)
def store() -> None:
    """See, check and clean the store of artifacts.

    \b
    python -m pipeline store ls
    python -m pipeline store gc --older-than 30 --keep quickstart
    """


@store.command()
@_store
def ls(spec: dict[str, str]) -> int:
    """List all artifacts with key, size, age and seconds."""
    from pipeline.commands import upkeep

    return upkeep.status(spec, upkeep.ls)


@store.command()
@_store
@click.argument("key")
def show(spec: dict[str, str], key: str) -> int:
    """Print the manifest of an artifact.

    KEY is its key, or the first digits of that.
    """
    from pipeline.commands import upkeep

    return upkeep.status(spec, partial(upkeep.show, key=key))


@store.command()
@_store
def verify(spec: dict[str, str]) -> int:
    """Compare every file with the sha256 in its manifest."""
    from pipeline.commands import upkeep

    return upkeep.status(spec, upkeep.verify)


@store.command()
@_store
def push(spec: dict[str, str]) -> int:
    """Upload what the cache of an address alone holds.

    Runs do that with what they make and use; this is for what they made while the address did not answer.
    """
    from pipeline.commands import upkeep

    return upkeep.status(spec, upkeep.push, new=True)


@store.command()
@_store
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
    spec: dict[str, str],
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
    return upkeep.status(spec, collect)


def _words(experiment: str) -> list[str]:
    """An experiment and its overrides, out of one argument."""
    try:
        words = shlex.split(experiment)
    except ValueError as error:
        raise click.UsageError(f"--keep {experiment!r} cannot be read: {error}.") from None
    if not words:
        raise click.UsageError("--keep names no experiment.")
    return words
