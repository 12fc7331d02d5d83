"""A store that tables of papers are made from, and how they are read."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra.utils import instantiate

from pipeline.commands.cli import main
from pipeline.results import lookup
from pipeline.results.lookup import Row
from pipeline.tables import paper, sheet
from tests.pipeline.conftest import Finished, Tiny

ROWS = ("dense", "las", "multigrain2", "gated2", "gated3", "ttfs")
AXES = ("transform=none", "timesteps=4,5", f"rows={','.join(ROWS)}")
TABLES = paper.names("table")


@dataclass(frozen=True)
class Swept:
    """A store that a sweep has filled, what its runs measured, and the overrides that name it."""

    folder: Path
    results: list[dict[str, Any]]
    overrides: list[str]

    def table(self, *arguments: str) -> Finished:
        """`python -m pipeline table` in this process."""
        return made(self.folder, *arguments, *self.overrides)

    def read(self, name: str, kind: str = "csv") -> Any:
        """The table of that name that was written last."""
        written = (self.folder / "outputs/tables/paper").glob(f"{name}*.{kind}")
        path = max(written, key=lambda file: file.stat().st_mtime_ns)
        return pd.read_csv(path) if kind == "csv" else path.read_text(encoding="utf-8")

    def rows(self, *more: str) -> list[Row]:
        with chdir(self.folder):
            chosen = ["experiment=codings", "transform=none", *self.overrides, *more]
            return lookup.rows(chosen)


def made(folder: Path, *arguments: str) -> Finished:
    out, err = io.StringIO(), io.StringIO()
    with chdir(folder), redirect_stdout(out), redirect_stderr(err):
        code = main(["table", *arguments])
    return Finished(code, out.getvalue(), err.getvalue(), folder)


@pytest.fixture(scope="session")
def swept(tmp_path_factory, command: Callable[..., Finished], tiny_run: Tiny) -> Swept:
    """Two corpora and a task, six codings at two T; the folder of the runs is gone."""
    folder = tmp_path_factory.mktemp("paper")
    words = (tiny_run.folder / "calibration.jsonl").read_text()[::-1]
    text = [{"text": part} for part in re.findall("[a-j ]{60,}", words)]
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    more = [
        "evaluation.corpora=[wikipedia,wikitext2]",
        f"corpus.wikitext2.path={folder}/other.jsonl",
        "evaluation.tasks=[piqa]",
    ]
    done = command(folder, "experiment=codings", *AXES, *more)
    assert done.code == 0, done.err
    results = done.results
    shutil.rmtree(folder / "outputs/runs")
    return Swept(folder, results, [*tiny_run.overrides, *more])


@pytest.fixture(scope="session")
def rows(swept: Swept) -> list[Row]:
    return swept.rows(*AXES[1:])


def layout(name: str) -> Callable[..., sheet.Sheet]:
    return instantiate(loaded(name).layout)


def loaded(name: str) -> Any:
    return paper.loaded("table", name, [])


def shown(markdown: str) -> list[dict[str, str]]:
    lines = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def forbidden(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a table loads no model and builds nothing")


def by_name(results: list[dict[str, Any]]) -> dict[tuple[str, Any], dict[str, Any]]:
    return {(r["label"].split()[0], r["timesteps"]): r for r in results}
