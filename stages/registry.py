"""Names and versions of codings, transforms and statistics, in keys and in exported models.

A name outlives the place of its file. `version` rises when the same fields come to mean something else.
A config of another version is refused, unless it is of the `oldest` that is read or a later one: of what
neurons were only fitted with, and which a model that has them does not ask for again.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from stages.errors import InputError

PACKAGES = (
    "stages.codings",
    "stages.transforms",
    "stages.fits",
)  # whose modules register what they define
T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Identity:
    """What a class is called for good, such as `coding/gated` in version 1; configs of the versions from
    `oldest` on are read as that."""

    name: str
    version: int
    oldest: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


_identities: dict[type, Identity] = {}
_classes: dict[str, type] = {}  # by name, and by the paths of classes in earlier exports


def register(
    name: str, version: int = 1, *, was: str | None = None, oldest: int | None = None
) -> Callable[[T], T]:
    """Give a class its name; `was` is its path in exports that were written before it had one, `oldest`
    the first version that is read, the `version` itself unless given.

    ValueError where a name is taken by another class.
    """

    def named(kind: T) -> T:
        for each in filter(None, (name, was)):
            taken = _classes.setdefault(each, kind)
            if taken.__qualname__ != kind.__qualname__:
                raise ValueError(f"{each} is the name of {taken.__qualname__} already")
            _classes[each] = kind
        _identities[kind] = Identity(name, version, oldest or version)
        return kind

    return named


def identity(kind: type) -> str | None:
    """`name@version` of a registered class; None for any other, a subclass of one too."""
    known = _identities.get(kind)
    return None if known is None else str(known)


def lookup(text: str) -> type:
    """The class of a `name@version`, or of the path of a class in an earlier export.

    InputError where this version of the software has no such class, or has another version of it.
    """
    name, _, version = text.partition("@")
    if name not in _classes:
        _import_all()
    kind = _classes.get(name)
    if kind is None:
        raise InputError(
            f"a config names the class {text!r}, which is none of this version's codings or "
            "transforms; load it with the version that wrote it"
        )
    known = _identities[kind]
    if version and version not in map(str, range(known.oldest, known.version + 1)):
        raise InputError(
            f"a config has {text}, and this version reads {known}; load it with the "
            "version that wrote it"
        )
    return kind


def registered(kind: str) -> dict[str, type]:
    """All classes of a kind (`coding`, `transform`, `statistic`) by the name of the class."""
    _import_all()
    names = {each: known.name.partition("/")[0] for each, known in _identities.items()}
    return {each.__name__: each for each, of in names.items() if of == kind}


def _import_all() -> None:
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        for module in pkgutil.iter_modules(path, f"{package}."):
            importlib.import_module(module.name)
