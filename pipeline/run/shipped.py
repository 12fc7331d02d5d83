"""The files of `conf/`: which choices a group has, and what they hold before Hydra composes them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stages.errors import InputError

CONF = Path(__file__).parents[2] / "conf"
NOT_A_TABLE = "published"  # the numbers of other papers, beside the tables that show them


@dataclass(frozen=True)
class Experiment:
    """A file of conf/experiment: its rows and axes, its coding, and the dotted keys that it sets."""

    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    coding: str | None = None
    keys: tuple[str, ...] = ()


def names(group: str, conf: Path = CONF) -> list[str]:
    """The choices of a group."""
    files = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    return [name for name in files if name != NOT_A_TABLE]


@functools.cache
def experiment(name: str, conf: Path = CONF) -> Experiment:
    """The experiment of a name; an empty one where `conf` has no such file."""
    whole = dict(_yaml(conf / "experiment" / f"{name}.yaml"))
    sweeper = whole.pop("hydra", {}).get("sweeper") or {}
    defaults = whole.pop("defaults", [])
    coding = next((d["override /coding"] for d in defaults if "override /coding" in d), None)
    return Experiment(
        sweeper.get("rows") or {}, sweeper.get("params") or {}, coding, tuple(leaves(whole))
    )


def default(group: str, conf: Path = CONF) -> str:
    """The choice that conf/config.yaml makes of a group."""
    return choices(group, conf)[0]


def dims(model: str, conf: Path = CONF) -> dict[str, Any]:
    """The published dimensions of a model; InputError where there are none."""
    known = [
        name for name in names("model", conf) if _yaml(conf / "model" / f"{name}.yaml")["dims"]
    ]
    if model not in known:
        raise InputError(f"energy.models: no dimensions of {model}; there are {', '.join(known)}")
    return dict(_yaml(conf / "model" / f"{model}.yaml")["dims"])


def choices(group: str, conf: Path = CONF) -> list[str]:
    """Those of a group of which conf/config.yaml may choose several, in their order."""
    parts = _yaml(conf / "config.yaml")["defaults"]
    chosen = next(part[group] for part in parts if isinstance(part, dict) and group in part)
    return [*map(str, chosen if isinstance(chosen, list) else [chosen])]


@functools.cache
def fields(coding: str, conf: Path = CONF) -> tuple[str, ...] | None:
    """The keys of a coding's file; None where `conf` has no such file."""
    keys = _yaml(conf / "coding" / f"{coding}.yaml")
    return tuple(key for key in keys if key[0] != "_") or None


def having(field: str, conf: Path = CONF) -> list[str]:
    """The codings that have a field."""
    return [name for name in names("coding", conf) if field in (fields(name, conf) or ())]


def entries(group: str, conf: Path = CONF) -> list[str]:
    """The names that every file of a group of named entries has."""
    return [name for file in sorted((conf / group).glob("*.yaml")) for name in _yaml(file)]


def keyed(group: str, conf: Path = CONF) -> dict[str, dict[str, Any]]:
    """The content of every file of a group of which a configuration chooses several, by its name.

    Raises InputError for a file that is no yaml or that has not one key of its own: files of one key
    would become one entry, mixed of both.
    """
    found: dict[str, dict[str, Any]] = {}
    owner: dict[str, Path] = {}
    for name in names(group, conf):
        file = conf / group / f"{name}.yaml"
        where = f"conf/{group}/{file.name}"
        try:
            content = yaml.safe_load(text := file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise InputError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
        if not (isinstance(content, dict) and len(content) == 1):
            raise InputError(f"{where}: give one key, whose value is a {group}")
        package = f"# @package energy.{group}"
        if not re.search(rf"(?m)^\s*#\s*@package\s+energy\.{group}\s*$", text):
            raise InputError(f"{where}: give the line {package}, which says where its key belongs")
        (key,) = content
        if key in owner:
            raise InputError(
                f"{where}: {key} is the key of {owner[key].name} too; give this file another key"
            )
        found[name], owner[key] = content, file
    return found


def leaves(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their keys, joined with a separator; empty ones are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        nested = isinstance(value, Mapping) and value
        flat |= leaves(value, separator, path + separator) if nested else {path: value}
    return flat


def _yaml(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {} if file.is_file() else {}
