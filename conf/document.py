"""Writes conf/README.md: every choice and every option, from the comments of the yaml files here."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).parent
KEY = re.compile(r"( *)([a-z][\w-]*):(?= |$)(.*?)(?:(?:^| )# (.*))?$")
INTRODUCTION = """# Options

Written by `make conf/README.md` from the comments of the files here.

`GROUP=CHOICE` takes another file of a folder of conf/: `coding=las` is conf/coding/las.yaml.
`GROUP.OPTION=VALUE` changes an option in it, and commas between values are a sweep. Quote what has
brackets: `'evaluation.tasks=[piqa]'`. `python -m pipeline --cfg job` and the words of a command print
all that it sets. A value below is that of the default choice or, where that lacks the option, of the
first that has it; `…` stands for options of its own.

## For every run
"""


def document() -> str:
    """The page: groups in the order of conf/config.yaml, the others behind them."""
    root = CONF / "config.yaml"
    defaults = yaml.safe_load(root.read_text())["defaults"]
    given = {
        group: choice for entry in defaults if entry != "_self_" for group, choice in entry.items()
    }
    folders = {file.parent.relative_to(CONF).as_posix() for file in CONF.rglob("*/*.yaml")}
    page = [INTRODUCTION, *options([root], "")]
    for group in [*(g for g in given if g in folders), *sorted(folders - set(given))]:
        files = sorted(
            (CONF / group).glob("*.yaml"), key=lambda file: (file.stem != given.get(group), file)
        )
        page += [f"\n## `{group}=`\n", "| choice | what it is |", "|---|---|"]
        page += [f"| `{file.stem}` | {parts(file)[0]} |" for file in files]
        place = package(files[0]) or group.replace("/", ".")
        page += options(files, f"{place}.") if group != "experiment" else []
    return "\n".join(page) + "\n"


def package(file: Path) -> str:
    """Where a file's options lie in the configuration; empty where that is at the name of its group."""
    at = re.match(r"# @package ([\w.]+)\n", file.read_text())
    return at[1] if at and at[1] != "_global_" else ""


def options(files: list[Path], prefix: str) -> list[str]:
    """The commented options of a group as a table, with the choices that have one where not all do."""
    rows: dict[str, tuple[str, str, list[str]]] = {}
    for file in files:
        for key, value, meaning in keys(file):
            known = rows.get(key, (value, meaning, []))
            rows[key] = (known[0], known[1] or meaning, [*known[2], f"`{file.stem}`"])
    table = []
    for key, (value, meaning, of) in rows.items():
        where = "" if len(of) == len(files) else ", ".join(of)
        table += [f"| `{prefix}{key}` | {value} | {meaning} | {where} |"] if meaning else []
    return ["\n| option | value | meaning | of |", "|---|---|---|---|", *table] if table else []


def keys(file: Path) -> Iterator[tuple[str, str, str]]:
    """The dotted name of every key of a file, its value, and the comment beside it or above it."""
    path: list[str] = []
    above: list[str] = []
    for line in parts(file)[1].splitlines():
        if match := KEY.match(line):
            path[len(match[1]) // 2 :] = [match[2]]
            value: Any = yaml.safe_load(file.read_text())
            for key in path:
                value = value[key] if isinstance(value, dict) else None  # inside a list
            parent = isinstance(value, dict) and not match[3].strip()
            shown = "…" if parent else f"`{json.dumps(value)}`"
            yield ".".join(path), shown, plain(match[4] or " ".join(above))
        above = [*above, line.strip("# ")] if line.lstrip().startswith("# ") else []


def parts(file: Path) -> tuple[str, str]:
    """The comment at the top of a file as one line, and what follows."""
    text = re.sub("# @package.*\n", "", file.read_text())
    end = len(re.match("(#.*\n)*", text)[0])  # type: ignore[index]
    return plain(" ".join(line.strip("# ") for line in text[:end].splitlines())), text[end:]


def plain(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


if __name__ == "__main__":
    (CONF / "README.md").write_text(document(), encoding="utf-8")
