"""The layout: which floor a module is on, and checks of imports, circles, lengths and folders.

Every import counts, also one inside a function, for type checkers alone, or by the name of a module.
"""

from __future__ import annotations

import ast
import graphlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MOST_LINES = 350
UNKNOWN_TO_STAGES = ("hydra", "omegaconf", "mlflow")


@dataclass(frozen=True)
class Floor:
    """Folders and modules that may import each other, and all floors below the ones they stand on."""

    members: tuple[str, ...]
    on: tuple[str, ...]


FLOORS = {
    "commands": Floor(("pipeline", "pipeline.__main__", "pipeline.commands"), ("shown",)),
    "shown": Floor(("pipeline.tracking", "pipeline.tables", "pipeline.figures"), ("results",)),
    "results": Floor(("pipeline.results",), ("run",)),
    "run": Floor(("pipeline.run",), ("store",)),
    "store": Floor(("pipeline.store",), ("door",)),
    "door": Floor(("stages", "stages.api"), ("stage",)),
    "stage": Floor(
        (
            "stages.capture",
            "stages.distribution",
            "stages.fitting",
            "stages.patching",
            "stages.evaluation",
            "stages.energy",
            "stages.export",
        ),
        ("measured",),
    ),
    "measured": Floor(
        (
            "stages.checkpoint",
            "stages.analysis",
            "stages.profiles",
            "stages.transforms",
            "stages.statistics",
        ),
        ("ports",),
    ),
    "ports": Floor(("stages.ports",), ("codings",)),
    "codings": Floor(("stages.codings",), ("fits", "text")),
    "fits": Floor(("stages.fits", "stages.neurons"), ("ground",)),
    "text": Floor(("stages.text",), ("model",)),
    "model": Floor(("stages.model",), ("ground",)),
    "ground": Floor(
        (
            "stages.atoms",
            "stages.fitted",
            "stages.compiler",
            "stages.counting",
            "stages.sketch",
            "stages.codec",
            "stages.registry",
            "stages.errors",
        ),
        (),
    ),
}
PACKAGES = ("stages", "pipeline")
Imports = Mapping[str, frozenset[str]]


def sources(root: Path, package: str) -> dict[str, Path]:
    """The modules of a package and their files."""
    files = sorted((root / package).rglob("*.py"))
    return {_module(file.relative_to(root)): file for file in files}


def _module(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(root: Path) -> Imports:
    """What every module of both packages imports of them."""
    files = {name: file for package in PACKAGES for name, file in sources(root, package).items()}
    graph = {}
    for name, file in files.items():
        parent = name if file.name == "__init__.py" else name.rpartition(".")[0]
        named = {_known(each, files) for each in _named(file, parent)}
        graph[name] = frozenset(named - {name, ""})
    return graph


def _known(name: str, files: Mapping[str, Path]) -> str:
    """The module that a dotted name is, or is in; "" for one of another package."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name


def _named(file: Path, parent: str) -> Iterator[str]:
    """Dotted names of all that a file imports."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), parent)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant):
                yield str(first.value)


def member(module: str) -> str:
    """The folder or module of the table that a module is of; "" for one that has no place in it."""
    places = [m for floor in FLOORS.values() for m in floor.members]
    holding = [
        m for m in places if module == m or (m not in PACKAGES and module.startswith(f"{m}."))
    ]
    return max(holding, default="", key=len)


def floor_of(module: str) -> str | None:
    place = member(module)
    return next((name for name, floor in FLOORS.items() if place in floor.members), None)


def below(floor: str) -> set[str]:
    """All floors that one stands on, itself among them."""
    return {floor}.union(*(below(each) for each in FLOORS[floor].on))


def wrong_arrows(graph: Imports, package: str) -> list[str]:
    """Modules without a floor, and imports of what does not stand below."""
    wrong = []
    for name in sorted(n for n in graph if n.partition(".")[0] == package):
        floor = floor_of(name)
        if floor is None:
            wrong.append(f"{name} stands on no floor")
            continue
        above = [other for other in sorted(graph[name]) if floor_of(other) not in below(floor)]
        wrong += [f"{name} ({floor}) imports {other} ({floor_of(other)})" for other in above]
    return wrong


def circle(graph: Imports) -> list[str]:
    """The modules, or the folders, that import each other in turn; empty where none do."""
    folders: dict[str, set[str]] = {}
    for name, others in graph.items():
        folders.setdefault(member(name) or name, set()).update(member(o) or o for o in others)
    inside = {name: others - {name} for name, others in folders.items()}
    for each in (graph, inside):
        try:
            graphlib.TopologicalSorter(each).prepare()
        except graphlib.CycleError as error:
            turn: list[str] = error.args[1][::-1]
            return turn
    return []


def long_files(folder: Path) -> list[str]:
    lines = {file: file.read_bytes().count(b"\n") for file in sorted(folder.rglob("*.py"))}
    return [f"{file} has {n} lines" for file, n in lines.items() if n > MOST_LINES]


def foreign(root: Path) -> list[str]:
    """Modules of stages that import a library which is the pipeline's."""
    return [
        f"{name} imports {each}"
        for name, file in sources(root, "stages").items()
        for each in _named(file, name)
        if each.partition(".")[0] in UNKNOWN_TO_STAGES
    ]


def no_codings(root: Path) -> list[str]:
    """Modules of stages.codings that are neither its base nor register a coding."""
    files = sources(root, "stages/codings")
    return [
        file.name
        for file in files.values()
        if file.name not in ("__init__.py", "base.py") and not any(_registered(file))
    ]


def _registered(file: Path) -> Iterator[str]:
    """Names of the codings that a file registers."""
    for node in ast.parse(file.read_bytes()).body:
        for call in getattr(node, "decorator_list", []):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("register"):
                name = ast.literal_eval(call.args[0])
                if name.startswith("coding/"):
                    yield name
