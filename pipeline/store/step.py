"""What determines an artifact: a stage, its fields, its inputs and the code that computes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pipeline.store.code import code_hash
from stages.codec import encode
from stages.registry import identity


@dataclass(frozen=True)
class Step:
    """Everything that determines one artifact.

    `spec` is a frozen dataclass, a mapping or a list of plain values, `inputs` maps a name to the
    key of another artifact, `modules` names the modules whose code computes this one, for example
    ("stages.capture",). It is empty where no code matters: a file pinned by its sha256 in `spec`.
    `made_by` is the hash of what calls them.
    """

    stage: str
    spec: Any
    inputs: Mapping[str, str]
    modules: tuple[str, ...]
    made_by: str = ""

    def code(self) -> str:
        """The hash of the code: of `modules`, of those that define the classes in `spec`, and of what
        calls them."""
        if not self.modules:
            return code_hash(())
        classes = {m for m in _class_modules(self.spec) if m.partition(".")[0] == "stages"}
        return code_hash(tuple(sorted({*self.modules, *classes})), self.made_by)

    def key(self) -> str:
        """The name of the artifact, 32 hexadecimal digits; TypeError if `spec` is not plain."""
        parts = {"stage": self.stage, "spec": plain(self.spec), "inputs": plain(self.inputs)}
        text = canonical(parts | {"code": self.code()})
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def canonical(value: Any) -> str:
    """The one json text of a value: keys sorted, no spaces, floats by repr.

    ValueError on nan and inf, which json does not have.
    """
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain(value: Any, where: str = "value") -> Any:
    """Turn dataclasses, mappings and sequences into what json knows; a dataclass keeps its registered
    name and version, or else its qualified name.

    Everything but these and None, bool, int, float, str is a TypeError that names the place.
    """
    return encode(value, where, _class_name)


def _class_name(kind: type) -> str:
    return identity(kind) or f"{kind.__module__}.{kind.__qualname__}"


def _class_modules(value: Any) -> Iterator[str]:
    """Modules of all dataclasses in a spec: a stage may call methods of what it never imports."""
    if is_dataclass(value):
        yield type(value).__module__
        members: Any = [getattr(value, f.name) for f in fields(value)]
    elif isinstance(value, Mapping):
        members = value.values()
    else:
        members = value if isinstance(value, list | tuple) else ()
    for member in members:
        yield from _class_modules(member)
