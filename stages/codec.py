"""Dataclasses as json and back: the registered name and version of the class beside its fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from stages.errors import InputError
from stages.registry import identity, lookup

CLASS = "class"  # the key of the name


def registered_name(kind: type) -> str:
    """Return `name@version` of a class; TypeError for one that is not registered."""
    name = identity(kind)
    if name is None:
        raise TypeError(f"{kind.__qualname__} has no registered name")
    return name


def encode(value: Any, where: str = "value", name: Callable[[type], str] = registered_name) -> Any:
    """Turn dataclasses, mappings and sequences into what json knows; `name` says what a class is called.

    A path says where something lies and a dtype, an enum or an array has no lasting text here,
    so everything but None, bool, int, float, str is a TypeError that names the place.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        members = {f.name: getattr(value, f.name) for f in fields(value)}
        return {CLASS: name(type(value))} | {
            key: encode(member, f"{where}.{key}", name) for key, member in members.items()
        }
    if isinstance(value, Mapping):
        if odd := [key for key in value if type(key) is not str]:
            raise TypeError(f"{where} has the key {odd[0]!r}; json has only str keys")
        return {key: encode(each, f"{where}.{key}", name) for key, each in value.items()}
    if type(value) in (list, tuple):
        return [encode(each, f"{where}[{i}]", name) for i, each in enumerate(value)]
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise TypeError(f"{where} is a {kind}; json has only plain values, and dataclasses by name")


def decode(value: Any) -> Any:
    """Undo `encode` for registered names; a list becomes a tuple.

    InputError for a name that is not registered, and for fields that its class does not take.
    """
    if isinstance(value, list):
        return tuple(decode(each) for each in value)
    if not isinstance(value, Mapping):
        return value
    kind: Any = lookup(str(value.get(CLASS)))
    try:
        return kind(**{key: decode(each) for key, each in value.items() if key != CLASS})
    except TypeError as error:  # an unknown field, or one that is missing
        raise InputError(
            f"a config gives {kind.__name__} what it does not take ({error}); load it with the "
            "version that wrote it"
        ) from error
