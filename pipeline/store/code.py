"""The hash of code: of the syntax trees of modules and of all that they import."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.store import whole

ROOT = Path(__file__).parents[2]  # the folder that holds the packages `pipeline` and `stages`
_UNTRUE = ("TYPE_CHECKING", "typing.TYPE_CHECKING")  # conditions that hold for type checkers only


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
            trees[name], imported = _needed(name, package, root)
            todo.extend(imported)
    text = "\n".join([*(f"{name} {trees[name]}" for name in sorted(trees)), *filter(None, [more])])
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def source_hash(*functions: Callable[..., Any]) -> str:
    """sha256 over the syntax trees of functions; docstrings and formatting do not count."""
    source = "".join(textwrap.dedent(inspect.getsource(each)) for each in functions)
    return _tree_hash(_Effective().visit(ast.parse(source)))


def _tree_hash(tree: ast.AST) -> str:
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


@dataclass(frozen=True)
class Outline:
    """What counts of a source file: the hash of its syntax tree, the modules that its statements import,
    and names that are imported from modules, which may be modules themselves."""

    tree: str
    imports: tuple[str, ...]
    members: tuple[str, ...]

    @classmethod
    def of(cls, source: bytes, file: Path, parent: str) -> Outline:
        """Parse the source of a module in package `parent`."""
        tree = _Effective().visit(ast.parse(source, filename=str(file)))
        imports: set[str] = set()
        members: set[str] = set()
        for node in _statements(tree):
            if isinstance(node, ast.Import):
                imports.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), parent)
                imports.add(base)
                members.update(f"{base}.{alias.name}" for alias in node.names)
        return cls(_tree_hash(tree), tuple(sorted(imports)), tuple(sorted(members)))

    @classmethod
    def kept(cls, file: Path, parent: str) -> Outline:
        """The same, kept beside the file's bytecode by the hash of the source: parsing takes ten times as
        long as reading."""
        source = file.read_bytes()
        known = hashlib.sha256(b"\0".join([_own(), parent.encode(), source])).hexdigest()
        place = Path(importlib.util.cache_from_source(str(file))).with_suffix(".outline.json")
        with suppress(OSError, ValueError, TypeError, KeyError):
            record = json.loads(place.read_bytes())
            if record.pop("source") == known:
                return cls(record["tree"], tuple(record["imports"]), tuple(record["members"]))
        outline = cls.of(source, file, parent)
        if not sys.dont_write_bytecode:
            with suppress(OSError):  # a folder that cannot be written to
                whole.write(place, json.dumps({"source": known, **asdict(outline)}))
        return outline


@functools.cache
def _own() -> bytes:
    """The source of this file, which determines every outline."""
    return Path(__file__).read_bytes()


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All below a node but expressions, in which nothing is imported and which are most of a tree."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield child
            yield from _statements(child)


class _Effective(ast.NodeTransformer):
    """Drops what never runs: statements that are only a string, and imports for type checkers."""

    def visit(self, node: ast.AST) -> Any:
        return node if isinstance(node, ast.expr) else super().visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        constant = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if constant else node

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        name = isinstance(node.test, ast.Name | ast.Attribute)
        return node.orelse if name and ast.unparse(node.test) in _UNTRUE else node


@functools.cache
def _needed(name: str, package: str, root: Path) -> tuple[str, tuple[str, ...]]:
    """The hash of a module's syntax tree, and the modules of `package` that it needs."""
    file = _source(name, root)
    if file is None:
        raise ModuleNotFoundError(f"cannot hash the code of {name}: no such module in {root}")
    parent = name if file.name == "__init__.py" else name.rpartition(".")[0]
    outline = Outline.kept(file, parent)
    sure = {*outline.imports, name.rpartition(".")[0]}  # a package runs before what is in it
    imported = {*sure, *outline.members}
    inside = (each for each in imported if each.partition(".")[0] == package)
    # Members without a file are classes or functions.
    return outline.tree, tuple(sorted(m for m in inside if m in sure or _source(m, root)))


@functools.cache
def _source(name: str, root: Path) -> Path | None:
    """The file of a module, found without importing it."""
    path = root.joinpath(*name.split("."))
    return next((f for f in (path / "__init__.py", path.with_suffix(".py")) if f.is_file()), None)
