"""`python -m pipeline table NAME`: a table of a paper, made of what the store holds."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.results import naming
from pipeline.run.errors import choose
from pipeline.run.overrides import settled
from pipeline.run.shipped import CONF, names
from stages.errors import InputError

if TYPE_CHECKING:
    from pipeline.results.lookup import Row
    from pipeline.tables.sheet import Sheet

# Where and how results are made says nothing of what a table shows.
CIRCUMSTANCES = ("store", "runtime", "tracking", "table")


@dataclass(frozen=True)
class Request:
    """What a command line asks for: the configuration of the table, and the overrides of its jobs.

    `stem` is the name of its files for a model of that name.
    """

    name: str
    config: Any
    overrides: tuple[str, ...]
    command: str
    stem: Callable[[str], str]


def main(arguments: Sequence[str]) -> int:
    """Writes table=NAME and its sidecar; the exit status, 1 for missing cells and bad input."""
    return status(lambda: _main(arguments))


def status(command: Callable[[], int | None]) -> int:
    """Runs a command that the store makes good to interrupt; the exit status."""
    from pipeline.run import errors

    try:
        return errors.exit_status(command)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what the store holds", file=sys.stderr)
        return 130


def _main(arguments: Sequence[str]) -> None:
    asked = request(arguments)
    if asked.config.fill:
        log_to_terminal()
    from pipeline.results import lookup
    from pipeline.tables import sheet

    try:
        rows = lookup.rows(asked.overrides, asked.config.fill)
    except lookup.Missing as error:
        if asked.config.fill:  # what failed is in the error
            raise
        again = f"{asked.command} table.fill=true"
        raise lookup.Missing(f"{error}\nor, without an entry in the dashboard: {again}") from None
    made = lay_out(asked.config, rows)
    written = write(asked, made, rows)
    print(f"{sheet.printed(made)}\n\nwritten: {', '.join(map(str, written))}")


def log_to_terminal() -> None:
    """Shows what jobs log, as `python -m pipeline` does; progress bars are for people."""
    line = "[%(asctime)s][%(levelname)s] %(message)s"
    logging.basicConfig(level=logging.INFO, format=line, datefmt="%H:%M:%S")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def parted(arguments: Sequence[str], group: str) -> tuple[str, list[str], list[str]]:
    """The name that `group`=NAME gives, the overrides of its file, and the overrides of its jobs.

    Raises InputError where no name or an unknown one is given.
    """
    mine = [a for a in arguments if re.match(rf"[+~]*{group}[.=]", a)]
    chosen = [a.partition("=")[2] for a in mine if a.startswith(f"{group}=")]
    if len(chosen) != 1:
        got = " ".join(f"{group}={name}" for name in chosen) or f"no {group}"
        raise InputError(f"got {got}; give one NAME out of {', '.join(names(group))}")
    if chosen[0] not in names(group):
        raise InputError(f"got {group}={chosen[0]}; {choose(chosen[0], names(group))}")
    return (
        chosen[0],
        [a for a in mine if not a.startswith(f"{group}=")],
        [a for a in arguments if a not in mine],
    )


def loaded(group: str, name: str, overrides: Sequence[str]) -> Any:
    """The configuration in conf/`group`/`name`.yaml with overrides of its keys."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return compose(f"{group}/{name}", list(overrides))[group]


def request(arguments: Sequence[str]) -> Request:
    """The table that a command line asks for; its experiment is the file's unless one is given."""
    name, mine, rest = parted(arguments, "table")
    config = loaded("table", name, mine)
    _check(config)
    given = [*mine, *rest]
    rest = settled(rest, default=config.experiment)
    (experiment,) = [a.partition("=")[2] for a in rest if a.startswith("experiment=")]
    base = name if experiment == config.experiment else f"{name}_{experiment}"
    typed = command("table", "table", arguments)
    return Request(name, config, tuple(rest), typed, partial(naming.stem, base, given))


def _check(config: Any) -> None:
    """Raises InputError for columns that the table of a run would refuse too."""
    from pipeline.run.settings import TableSpec

    TableSpec(config.columns, config.wide)


def command(verb: str, group: str, arguments: Sequence[str]) -> str:
    """The command line of a verb whose arguments choose a name of `group`, which comes first."""
    key = f"{group}="
    chosen = [a.removeprefix(key) for a in arguments if a.startswith(key)]
    rest = [a for a in arguments if not a.startswith(key)]
    return shlex.join(["python", "-m", "pipeline", verb, *chosen, *rest])


def lay_out(config: Any, rows: Sequence[Row]) -> Sheet:
    """The sheet of a table."""
    from hydra.utils import instantiate

    from pipeline.tables import tables

    made: Sheet = instantiate(config.layout)(rows)
    return tables.choice(made, config.columns)


def write(asked: Request, made: Sheet, rows: Sequence[Row]) -> list[Path]:
    """The table as md, csv and tex, and the json that says where its numbers come from."""
    from pipeline.tables import sheet

    model = rows[0].run.settings.axes["model"]
    stem = Path(asked.config.folder) / asked.stem(model)
    written = sheet.write(made, stem, asked.config.wide)
    sidecar = stem.with_name(f"{stem.name}.json")
    sidecar.write_text(json.dumps(record(asked, rows), indent=1) + "\n", encoding="utf-8")
    return [*written, sidecar]


def record(asked: Request, rows: Sequence[Row]) -> dict[str, Any]:
    """Every row's command and artifact keys, what made the artifacts, and the spec's hash."""
    from pipeline.store import provenance

    artifacts, environments = origins(rows)
    revisions = {json.dumps(entry["git"]): entry["git"] for entry in artifacts.values()}
    return {
        "table": asked.name,
        "command": asked.command,
        "spec_sha256": spec(asked, rows),
        "tree": provenance.git_state(),
        "revisions": list(revisions.values()),
        "rows": [
            {
                "name": row.run.settings.name,
                **row.result["axes"],
                "command": row.job.command,
                "keys": row.result["keys"],
            }
            for row in rows
        ],
        "artifacts": artifacts,
        "environments": environments,
    }


def origins(rows: Sequence[Row]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Where artifacts come from, by key as their manifests say, and the environments they name.

    An environment is the versions and the machine that built some of them.
    """
    environments: list[dict[str, Any]] = []
    artifacts = {}
    for artifact in (artifact for row in rows for artifact in row.run.artifacts.values()):
        built = artifact.manifest
        environment = {name: built[name] for name in ("versions", "machine")}
        if environment not in environments:
            environments.append(environment)
        kept = {name: built[name] for name in ("stage", "seconds", "created", "git")}
        artifacts[artifact.key] = kept | {"environment": environments.index(environment)}
    return artifacts, environments


def spec(asked: Request, rows: Sequence[Row]) -> str:
    """The hash of what the table shows: its layout and the configurations of its rows."""
    from omegaconf import OmegaConf

    from pipeline.store.step import canonical

    layout: Any = OmegaConf.to_container(asked.config.layout, resolve=True)
    jobs = []
    for row in rows:
        config: Any = OmegaConf.to_container(row.job.config, resolve=True)
        jobs.append({name: v for name, v in config.items() if name not in CIRCUMSTANCES})
    return hashlib.sha256(canonical({"layout": layout, "rows": jobs}).encode()).hexdigest()
