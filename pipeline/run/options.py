"""A configuration as settings, each value checked against the type of the field that it fills.

Where a stage would fail on a null or a word with an error of its own, the option is named instead.
"""

from __future__ import annotations

import functools
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from pipeline.run.errors import unknown_key
from pipeline.run.grammar import text
from stages.errors import InputError

if typing.TYPE_CHECKING:
    from pipeline.run.settings import Settings

KINDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
SEVERAL = {int: "whole numbers", float: "finite numbers", str: "names"}
NONE = type(None)


def settings(config: DictConfig) -> Settings:
    """The settings of a configuration.

    Raises InputError for a value of another kind than its field, a missing or an unknown key.
    """
    check(OmegaConf.to_container(config, resolve=True))
    made: Settings = instantiate(config)
    return made


def check(node: Any, path: str = "") -> None:
    """Raises InputError where a node's fields are not those of its `_target_`, naming the option."""
    try:
        kind = get_class(node["_target_"])
    except (ImportError, ValueError) as error:
        where = _below(path, "_target_")
        raise InputError(f"{where}={node['_target_']}: there is no such class") from error
    if not is_dataclass(kind):
        return
    hints, known = hints_of(kind), {f.name: f for f in fields(kind) if f.init}
    for key in node:
        if key not in known and not key.startswith("_"):
            raise InputError(unknown_key(_below(path, key), [_below(path, name) for name in known]))
    # A plain value first: one that others refer to is named itself.
    for name, field in sorted(known.items(), key=lambda f: isinstance(node.get(f[0]), Mapping)):
        where = _below(path, name)
        if name in node:
            _check_value(where, node[name], hints.get(name, Any))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise InputError(
                f"{where} is not given; {where.partition('.')[0]} has no default for it"
            )


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass' fields; Any for one whose name is known to type checkers alone."""
    hints = {}
    for each in reversed(kind.__mro__):
        names = vars(sys.modules[each.__module__])
        for name, hint in each.__dict__.get("__annotations__", {}).items():
            try:
                hints[name] = eval(hint, dict(names)) if isinstance(hint, str) else hint
            except NameError:
                hints[name] = Any
    return hints


def _below(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _check_value(path: str, value: Any, hint: Any) -> None:
    if isinstance(value, Mapping) and "_target_" in value:
        check(value, path)
    elif isinstance(value, Mapping) and _origin(hint) is Mapping:
        for key, entry in value.items():
            if isinstance(entry, Mapping) and "_target_" in entry:
                check(entry, f"{path}.{key}")
    elif not _fits(value, hint):
        raise InputError(_refusal(path, value, hint))


def _origin(hint: Any) -> Any:
    origin = typing.get_origin(hint) or hint
    if origin in (tuple, list, Sequence):
        return Sequence
    return Mapping if origin is dict else origin


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; any other by itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_one(value, member) for member in _members(hint))


def _fits_one(value: Any, kind: Any) -> bool:
    origin = _origin(kind)
    if kind is Any:
        return True
    if origin is Sequence:
        element = next((arg for arg in typing.get_args(kind) if arg is not ...), Any)
        return isinstance(value, list) and all(_fits(each, element) for each in value)
    if kind is float:
        # Keys and exports are JSON, which has neither nan nor inf.
        return type(value) is int or (type(value) is float and math.isfinite(value))
    if kind in (int, str, bool, NONE):
        return type(value) is kind
    if origin is Literal:
        return value in typing.get_args(kind)
    if origin is Mapping:
        return isinstance(value, Mapping)
    # What another file of conf describes: a mapping without `_target_` is its own error.
    return not isinstance(origin, type) or isinstance(value, Mapping)


def _refusal(path: str, value: Any, hint: Any) -> str:
    kinds = [kind for kind in _members(hint) if kind is not NONE]
    nullable = " or null" if len(kinds) < len(_members(hint)) else ""
    got = f"{path}={text(value)}"
    if any(_origin(kind) is Sequence for kind in kinds):
        if isinstance(value, str | int | float):
            return f"{got}: give a list{nullable}, {path}=[{text(value)}]"
        (kind,) = [kind for kind in kinds if _origin(kind) is Sequence]
        element = next((arg for arg in typing.get_args(kind) if arg is not ...), str)
        return f"{got}: give a list of {SEVERAL.get(element, 'entries')}{nullable}"
    if str in kinds and isinstance(value, int | float):
        return (
            f"{got} is read as {_kind(value)}, and text is wanted: type '{path}=\"{text(value)}\"'"
        )
    return f"{got}: give {' or '.join(_named(kind, path) for kind in kinds)}{nullable}"


def _named(kind: Any, path: str) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    return KINDS.get(kind, f"a file of conf/{path.partition('.')[0]}")


def _kind(value: Any) -> str:
    return KINDS[type(value)].replace("finite ", "")  # nan is read as one too
