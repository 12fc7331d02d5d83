"""What determines an artifact: a stage, its fields, its inputs and the code that computes it."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from stages.codec import encode
from stages.registry import identity

ROOT = Path(__file__).parents[2]  # the folder that holds the packages `pipeline` and `stages`
_UNTRUE = ("TYPE_CHECKING", "typing.TYPE_CHECKING")  # conditions that hold for type checkers only


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


@functools.cache
def code_hash(
    modules: tuple[str, ...], more: str = "", package: str = "stages", root: Path = ROOT
) -> str:
    """sha256 over the syntax trees of modules and of all of `package` that they import, and of `more`.

    Docstrings, comments and formatting do not count. A module that cannot be found is a
    ModuleNotFoundError: leaving it out could make a stale artifact look fresh.
    """
    trees: dict[str, str] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name not in trees:
            trees[name], imported = _parse(name, package, root)
            todo.extend(imported)
    text = "\n".join([*(f"{name} {trees[name]}" for name in sorted(trees)), *filter(None, [more])])
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def source_hash(source: str) -> str:
    """sha256 over the syntax tree of a function's source; docstrings and formatting do not count."""
    tree = _Effective().visit(ast.parse(textwrap.dedent(source)))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


class _Effective(ast.NodeTransformer):
    """Drops what never runs: statements that are only a string, and imports for type checkers."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        constant = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if constant else node

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if ast.unparse(node.test) in _UNTRUE else node


@functools.cache
def _parse(name: str, package: str, root: Path) -> tuple[str, tuple[str, ...]]:
    """The text of a module's syntax tree, and the modules of `package` that it needs."""
    file = _source(name, root)
    if file is None:
        raise ModuleNotFoundError(f"cannot hash the code of {name}: no such module in {root}")
    tree = _Effective().visit(ast.parse(file.read_bytes(), filename=str(file)))
    parent = name if file.name == "__init__.py" else name.rpartition(".")[0]
    imported = {m for node in ast.walk(tree) for m in _imports(node, parent, root)}
    imported.add(name.rpartition(".")[0])  # a package runs before what is in it
    inside = sorted(m for m in imported if m.partition(".")[0] == package)
    return ast.dump(tree), tuple(inside)


def _imports(node: ast.AST, parent: str, root: Path) -> Iterator[str]:
    """Names of the modules that one import statement of a module in package `parent` loads."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = importlib.util.resolve_name("." * node.level + (node.module or ""), parent)
        yield base
        inner = (f"{base}.{alias.name}" for alias in node.names)
        yield from (name for name in inner if _source(name, root))  # else a class or a function


def _source(name: str, root: Path) -> Path | None:
    """The file of a module, found without importing it."""
    path = root.joinpath(*name.split("."))
    return next((f for f in (path / "__init__.py", path.with_suffix(".py")) if f.is_file()), None)
