"""What a user reads when something is refused: one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from pipeline.run import grammar
from pipeline.run.shipped import CONF, having
from stages.errors import InputError, nearest

REFUSED = (HydraException, OmegaConfBaseException, InputError)  # what a user can mend


def exit_status(command: Callable[[], int | None], refused: int = 1) -> int:
    """Run a command; its exit status, `refused` where it or a file cannot be used, in one line."""
    try:
        return command() or 0
    except (*REFUSED, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return refused


def one_line(error: BaseException) -> str:
    """What Hydra says, without its search path; what a stage said where it refused its fields."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, OverrideParseException):
        typed = grammar.quoted(error.override)
        why = f"; if its value is meant as it is, type {typed}" if typed else f": {_first(error)}"
        return f"{error.override} cannot be read{why}"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name}: no such choice; {choose(name, error.options)}"
    if isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError):
        return _unknown(error.__cause__)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}"
    return " ".join(str(error).partition("Config search path")[0].split())


def choose(name: str, known: Sequence[str]) -> str:
    """What to choose among instead of a name that is not known."""
    near = nearest(name, known)
    return f"{f'{near} Choose' if near else 'choose'} among {', '.join(known)}"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What a user reads of a key that is none of the known ones beside it."""
    hint = f"{nearest(key, known)} --cfg job shows all keys".lstrip()
    return f"unknown config key {key}; {hint}"


def _unknown(cause: Any) -> str:
    key, parent = str(cause.full_key), cause.parent_node
    group, _, field = key.rpartition(".")
    others = having(field) if group else []
    if others and group != "coding" and field != "name":  # which every group has
        return f"unknown config key {key}; did you mean coding.{field}?"
    if others and group == "coding":
        name = parent._get_node("name")._value()
        verb = "has" if len(others) == 1 else "have"
        return f"unknown config key {key}; {name} has no {field}, {', '.join(others)} {verb}"
    siblings = [
        f"{group}.{name}" if group else str(name) for name in parent or () if name[0] != "_"
    ]
    root = parent._get_root() if isinstance(parent, DictConfig) else OmegaConf.create({})
    below = [name for name in _keys(root) if name.rpartition(".")[2] == field and name != key]
    if below and not group:  # the key of a group, without the group
        return f"unknown config key {key}; did you mean {' or '.join(below)}?"
    groups = [] if group else [path.name for path in CONF.iterdir() if path.is_dir()]
    return unknown_key(key, [*siblings, *groups])


def _keys(root: Any) -> list[str]:
    """The dotted keys of a configuration."""
    keys: list[str] = []
    todo: list[tuple[str, Any]] = [("", OmegaConf.to_container(root, resolve=False))]
    while todo:
        prefix, values = todo.pop(0)
        for key, value in values.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, dict):
                todo.append((f"{prefix}{key}.", value))
    return [key for key in keys if key.rpartition(".")[2][0] != "_"]


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
