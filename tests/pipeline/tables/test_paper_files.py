"""Tables of a paper come from the store alone, which says of every number where it comes from."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest

from pipeline.results.columns import bounded_perplexity
from pipeline.results.lookup import Row
from pipeline.run import runner
from pipeline.run.jobs import jobs
from pipeline.tables import paper
from stages.errors import InputError
from tests.pipeline.conftest import REPOSITORY, main_in
from tests.pipeline.tables.papers import (
    AXES,
    by_name,
    forbidden,
    made,
    shown,
)

pytestmark = pytest.mark.slow


def test_a_missing_cell_names_the_commands_that_fill_it(swept, monkeypatch):
    arguments = ("table=main", "experiment=codings", "transform=none", "rows=dense,las")
    done = swept.table(*arguments, "timesteps=4,7")
    assert done.code == 1 and done.err.startswith("error: 1 of 4 rows are not in outputs/store")
    assert done.err.count("\n") == 3
    assert "las T=7 n=1 lacks fitting, patching, evaluation ppl_wikipedia," in done.err
    (line,) = re.findall(r"^ +(python -m pipeline .*)$", done.err, re.MULTILINE)
    (fill,) = re.findall(r": (python -m pipeline table .*)$", done.err, re.MULTILINE)
    tables = swept.folder.glob("outputs/tables/paper/main*.md")
    assert not [path for path in tables if "| 7 |" in path.read_text()]
    filled = main_in(swept.folder, shlex.split(line)[3:])
    assert filled.code == 0, filled.err
    monkeypatch.setattr(runner, "execute", forbidden)
    again = made(swept.folder, *shlex.split(fill)[4:])  # nothing is left to fill
    assert again.code == 0, again.err
    (row,) = [r for r in shown(swept.read("main", "md")) if r["T"] == "7"]
    (result,) = filled.results
    mean = (result["ppl_wikipedia"] + result["ppl_wikitext2"]) / 2
    error = math.hypot(result["ppl_wikipedia_se"], result["ppl_wikitext2_se"]) / 2
    assert row["method"] == "LAS"
    assert row["mean perplexity"] == bounded_perplexity(mean, error)


def test_fill_runs_what_is_missing_and_lists_what_failed(swept, monkeypatch):
    execute, ran = runner.execute, []

    def counted(settings: Any, command: str) -> Any:
        ran.append(settings.name)
        if settings.timesteps == 9:
            raise InputError("no T of nine here")
        return execute(settings, command)

    monkeypatch.setattr(runner, "execute", counted)
    arguments = (
        "table=main",
        "experiment=codings",
        "transform=none",
        "rows=las",
        "table.fill=true",
    )
    done = swept.table(*arguments, "timesteps=4,9,8")
    assert done.code == 1 and "1 of 2 jobs failed" in done.err
    assert "timesteps=9" in done.err and done.err.rstrip().endswith("no T of nine here")
    assert ran == ["las T=9 n=1", "las T=8 n=1"]
    assert swept.table(*arguments, "timesteps=4,8").code == 0  # the failed job stopped nothing
    assert list(swept.read("main")["timesteps"]) == [4, 8] and len(ran) == 2


def test_the_same_store_gives_the_same_bytes(swept, tmp_path):
    arguments = ["table=main", "experiment=codings", *AXES[:2], "rows=dense,las,gated3"]
    assert swept.table(*arguments, f"table.folder={tmp_path}/a").code == 0
    assert swept.table(*arguments, f"table.folder={tmp_path}/b").code == 0
    command = [sys.executable, "-m", "pipeline", "table", *arguments, f"table.folder={tmp_path}/c"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [*command, *swept.overrides],
        cwd=swept.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for kind in ("md", "csv", "tex"):
        texts = {path.read_bytes() for path in tmp_path.glob(f"[abc]/main_codings_*.{kind}")}
        assert len([*tmp_path.glob(f"[abc]/*.{kind}")]) == 3
        assert len(texts) == 1 and b"\r" not in texts.pop()


def test_the_sidecar_tells_where_every_number_comes_from(swept, rows):
    asked = paper.request(["table=codings", *AXES, *swept.overrides])
    told, measured = json.loads(json.dumps(paper.record(asked, rows))), by_name(swept.results)
    store = swept.folder / "outputs/store"
    assert len(told["rows"]) == 10
    for row in told["rows"]:
        assert row["keys"] == measured[row["name"].split()[0], row["timesteps"]]["keys"]
        for key in row["keys"].values():
            entry = told["artifacts"][key]
            manifest = json.loads((store / entry["stage"] / key / "manifest.json").read_text())
            assert (entry["seconds"], entry["git"]) == (manifest["seconds"], manifest["git"])
            assert told["environments"][entry["environment"]]["versions"] == manifest["versions"]
    (job,) = jobs(shlex.split(told["rows"][3]["command"])[3:-1])
    assert job.settings.name == told["rows"][3]["name"]
    assert told["revisions"] and set(told["tree"]) == {"revision", "dirty"}


def test_the_hash_of_the_spec_changes_with_what_is_shown_only(swept, rows):
    def spec(rows: list[Row], *arguments: str) -> str:
        return paper.spec(paper.request(["table=main", *arguments]), rows)

    first, las = spec(rows), ("timesteps=5", "rows=las")
    moved = swept.rows(
        f"store.path={swept.folder}/outputs/../outputs/store", "runtime.batch=2", *las
    )
    (same,) = [row for row in rows if row.result["label"] == "las T=5 n=1"]
    assert spec(moved) == spec([same])
    assert spec(rows, "table.folder=elsewhere", "table.fill=true") == first
    assert len({first, spec(rows[1:]), spec(rows, "+table.layout.names.phase=PHASE")}) == 3
