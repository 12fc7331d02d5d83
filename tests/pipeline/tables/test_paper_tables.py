"""Tables of a paper: from the store alone, with every number where the runs have it."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra.utils import instantiate

from pipeline.commands.cli import main
from pipeline.results import lookup, published
from pipeline.results.lookup import Row
from pipeline.run import inputs, runner
from pipeline.run.jobs import jobs
from pipeline.tables import layouts, paper, sheet
from stages.errors import InputError
from tests.pipeline.conftest import REPOSITORY, Finished, Tiny, main_in
from tests.pipeline.tables.test_latex import check_latex, compile_latex

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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


def test_main_has_what_the_runs_measured(swept, monkeypatch):
    monkeypatch.setattr(inputs, "load", forbidden)
    done = swept.table("table=main", "experiment=codings", *AXES)
    assert done.code == 0, done.err
    frame, measured = swept.read("main"), by_name(swept.results)
    assert len(frame) == len(measured) == 10  # dense and ttfs are one row each
    for (_, row), text in zip(frame.iterrows(), shown(swept.read("main", "md")), strict=True):
        result = measured[row["row"], None if math.isnan(row["timesteps"]) else row["timesteps"]]
        mean = (result["ppl_wikipedia"] + result["ppl_wikitext2"]) / 2
        assert row["ppl_mean"] == pytest.approx(mean, rel=1e-12)
        assert row["ppl_wikitext2"] == result["ppl_wikitext2"]
        assert row["acc_mean"] == result["acc_piqa"] and row["acc_mean_stderr"] > 0
        assert text["mean perplexity"].strip("*") == f"{mean:.2f}"
        assert text["accuracy [%]"].strip("*").startswith(f"{100 * result['acc_piqa']:.0f} ± ")
        if result["conversion_s"] is not None:
            assert float(text["conversion [s]"]) == pytest.approx(result["conversion_s"], abs=0.05)
    assert list(frame["timesteps"].fillna(0)) == sorted(frame["timesteps"].fillna(0))
    for told in ("mean over wikipedia (3 windows of 48 tokens), wikitext2", "piqa (6 questions)"):
        assert told in swept.read("main", "md").splitlines()[0]


def test_rows_on_different_texts_are_refused(swept, rows):
    settings = replace(rows[0].run.settings.evaluation, windows=2)
    other = replace(rows[0].run.chain, settings=replace(rows[0].run.settings, evaluation=settings))
    odd = replace(rows[0], run=replace(rows[0].run, chain=other))
    with pytest.raises(InputError, match=r"evaluation\.\* one value"):
        layout("main")([odd, *rows[1:]])


@pytest.mark.parametrize("name", ["main", "codings", "energy"])
def test_bold_is_the_best_of_its_t_and_never_the_dense_model(name, rows):
    """Against the numbers of the csv, section by section."""
    made = layout(name)(rows)
    bold = pd.DataFrame(made.bold(), columns=[column.name for column in made.columns])
    frame = made.frame.assign(phase=made.frame.get("phase", ""))
    competing = frame[frame["coding"] != "dense"]
    checked = 0
    for column in (c for c in made.columns if c.best):
        for _, part in competing.groupby(["phase", "timesteps"]):
            values = part[column.name]
            best = values.min() if column.best == "min" else values.max()
            marked = values[bold[column.name][part.index]]
            assert len(part) == 1 or best in set(marked), column.name
            checked += len(marked)
    assert checked > 4 and not bold[made.frame["coding"] == "dense"].any(axis=None)
    assert not bold[made.frame["timesteps"] == 128].any(axis=None)  # alone it beats nobody


def test_ties_are_all_bold_and_what_diverged_never_is(rows):
    changed = []
    for row in rows:
        ppl = {"las": math.inf, "multigrain2": 20.001, "gated2": 20.004, "gated3": 1e9}
        value = ppl.get(row.result["label"].split()[0], 30.0)
        values = {"ppl_wikipedia": value, "ppl_wikitext2": value, "saving": 0.1}
        changed.append(replace(row, result=row.result | values))
    made = layout("main")(changed)
    names = zip(made.frame["row"], made.frame["timesteps"], strict=True)
    texts = dict(zip(names, cells(made), strict=True))
    assert texts["multigrain2", 4] == texts["gated2", 4] == "**20.00**"
    assert texts["las", 4] == ">1e4" and texts["ttfs", 128] == "30.00"
    assert ">1e4: diverged" in made.caption
    assert made.frame.set_index(["row", "timesteps"])["ppl_mean"]["gated3", 5] == 1e9
    spent = layout("energy")([replace(r, result=r.result | {"energy_J": 0.0}) for r in changed])
    alive = spent.frame["ppl_mean"] < 1e4
    bold = pd.DataFrame(spent.bold())
    assert bold[alive].any(axis=None) and not bold[~alive].any(axis=None)


def test_a_bound_that_does_not_spike_is_never_bold(rows):
    bound = {"ppl_wikipedia": 1.0, "ppl_wikitext2": 1.0, "nmse": 1e-9, "spikes_per_value": None}
    gated3 = [row.result["label"].startswith("gated3") for row in rows]
    pairs = zip(rows, gated3, strict=True)
    made = layout("codings")([replace(r, result=r.result | bound) if b else r for r, b in pairs])
    bold, bounds = pd.DataFrame(made.bold()), made.frame["row"] == "gated3"
    assert bounds.sum() == 2 and bold[~bounds].any(axis=None) and not bold[bounds].any(axis=None)


def cells(made: sheet.Sheet) -> list[str]:
    return [row["mean perplexity"] for row in shown(sheet.markdown(made))]


def test_energy_saves_against_the_dense_model_of_its_convention_and_phase(swept, rows):
    frame = layout("energy")(rows).frame
    assert len(frame) == 2 * len(rows) and set(frame["phase"]) == {"prefill", "decode"}
    for _, part in frame.groupby("phase"):
        for name in ("paper", "causal"):
            joules = 4.6e-3 * part[f"macs_G_{name}"] + 0.9e-3 * part[f"acs_G_{name}"]
            assert part[f"energy_J_{name}"].to_numpy() == pytest.approx(joules.to_numpy(), rel=1e-9)
            dense = joules[part["coding"] == "dense"].iloc[0]
            saved = (1 - joules / dense).to_numpy()
            assert part[f"saving_{name}"].to_numpy() == pytest.approx(saved, abs=1e-9)
    measured = by_name(swept.results)["gated2", 5]
    row = frame[(frame["row"] == "gated2") & (frame["timesteps"] == 5)].set_index("phase")
    assert row["acs_G_paper"]["decode"] == measured["paper_decode"]["acs_G"]
    assert row["acs_G_causal"]["prefill"] == measured["acs_G"] != row["acs_G_paper"]["prefill"]


def test_grains_is_a_matrix_of_n_by_t(swept):
    axes = "rows=dense,multigrain2,gated2,gated3"
    done = swept.table("table=grains", "experiment=codings", *AXES[:2], axes)
    assert done.code == 0, done.err
    frame, measured = swept.read("grains"), by_name(swept.results)
    assert list(frame["method"]) == ["dense", "multigrain", "gated", "gated"]
    for name, row in zip(axes[8:].split(","), frame.to_dict("records"), strict=True):
        for t in (4, 5):
            result = measured[name, None if name == "dense" else t]
            mean = (result["ppl_wikipedia"] + result["ppl_wikitext2"]) / 2
            assert row[f"ppl_T{t}"] == pytest.approx(mean)
    assert swept.read("grains", "tex").count("\\multicolumn{2}{c}{mean perplexity}") == 1
    best = frame.loc[1:, "ppl_T5"].min()
    assert f"**{best:.2f}**" in swept.read("grains", "md")


def test_two_jobs_for_one_cell_of_grains_are_refused(rows):
    twice = next(row for row in rows if row.result["label"] == "gated3 T=5 n=3")
    with pytest.raises(InputError, match="gated3 T=5 n=3 is not the only job"):
        layout("grains")([*rows, twice])


def test_per_site_has_every_site_once_and_the_mean_of_the_row(swept):
    axes = ("transform=none", "timesteps=5", "rows=gated3")
    done = swept.table("table=per_site", "experiment=codings", *axes)
    assert done.code == 0, done.err
    frame = swept.read("per_site")
    logs = frame["nmse"].map(math.log)
    measured = by_name(swept.results)["gated3", 5]
    assert math.exp(logs.mean()) == pytest.approx(measured["nmse"], rel=1e-6)
    assert len(frame) == frame["site"].nunique() == 21
    assert frame["role"].drop_duplicates().tolist() == frame["role"].unique().tolist()
    assert (frame.groupby("role", sort=False).ngroup().diff().dropna() >= 0).all()
    down = frame[frame["role"] == "mlp.down"]
    assert down["values"].tolist() == [3 * 48 * 48] * 2  # windows x tokens x channels, two layers
    several = swept.table("table=per_site", "experiment=codings", *axes[:2], "rows=las,gated3")
    assert several.code == 1 and "shows one configuration, got 2" in several.err


def test_codings_shows_what_was_measured(swept):
    done = swept.table("table=codings", *AXES)
    assert done.code == 0, done.err
    (row,) = [
        r for r in shown(swept.read("codings", "md")) if r["method"] == "gated3" and r["T"] == "5"
    ]
    measured = by_name(swept.results)["gated3", 5]
    texts = {name: text.strip("*") for name, text in row.items()}
    assert texts["ppl wikipedia"] == f"{measured['ppl_wikipedia']:.2f}"
    assert float(texts["nmse"]) == pytest.approx(measured["nmse"], rel=0.05)
    assert float(texts["saving [%]"]) == pytest.approx(100 * measured["saving"], abs=0.05)
    assert texts["bits"] == f"{5 + math.log2(3):.3g}" and texts["n"] == "3"


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
    assert row["method"] == "LAS" and row["mean perplexity"] == f"{mean:.2f}"


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


def test_published_rows_stand_below_and_never_compete(swept, rows, tmp_path, monkeypatch):
    theirs = [
        {
            "model": model,
            "method": "GIF",
            "T": t,
            "n": None,
            "time": seconds,
            "ppl": ppl,
            "acc": acc,
        }
        | {"source": f"the paper on {model}"}
        for model, t, seconds, ppl, acc in (
            ("big", 4, 60, 1.5, 99.0),
            ("big", 8, None, None, None),
            ("bigger", None, None, ">100", 67.25),
        )
    ]
    (tmp_path / "published.yaml").write_text(json.dumps({"rows": theirs}))
    monkeypatch.setattr(published, "FILE", tmp_path / "published.yaml")
    made = paper.lay_out(paper.loaded("table", "main", ["table.published=[bigger,big]"]), rows)
    texts = [list(row.values()) for row in shown(sheet.markdown(made))[-4:]]
    assert texts[0][0] == "tiny" and "published" not in texts[0][0]
    assert texts[1:] == [
        ["bigger, published [1]", "GIF", "–", "–", "–", ">100", "67.25"],
        ["big, published [2]", "GIF", "–", "4", "60.0", "1.50", "99.00"],
        ["big, published [2]", "GIF", "–", "8", "–", "–", "–"],
    ]
    assert made.starts()[-3:] == [True, True, False]
    assert "[1] the paper on bigger; [2] the paper on big." in made.caption
    assert "diverged" not in made.caption.partition("Published")[0].replace("did not diverge", "")
    with pytest.raises(InputError, match="got huge; choose among big, bigger"):
        published.rows(["huge"])
    monkeypatch.undo()
    shipped = published.rows(["llama2-7b", "llama3-8b"])
    sheet.write(layouts.main(rows, {}, shipped), tmp_path / "all")
    check_latex(tmp_path / "all.tex")


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_sound_latex(name, swept, rows, tmp_path):
    chosen = rows
    if name in ("per_site", "grains"):
        chosen = [row for row in rows if row.result["label"] == "gated3 T=5 n=3"]
    made = layout(name)(chosen)
    check_latex(sheet.write(made, tmp_path / name)[2])
    assert max(map(len, sheet.printed(made, 120).splitlines())) <= 120
    assert "environment" in made.frame and made.note == ""  # all was computed here


def test_the_columns_of_a_table_are_chosen_and_its_csv_has_all(swept):
    arguments = ("table=main", "experiment=codings", *AXES[:2], "rows=dense,las")
    done = swept.table(*arguments, "table.columns=[method,T,ppl]", "table.wide=true")
    assert done.code == 0, done.err
    (heads, *_) = [[*row] for row in shown(swept.read("main", "md"))]
    assert heads[:2] == ["method", "T"] and {"wikipedia: ppl", "wikitext2: ppl"} < {*heads}
    assert "accuracy [%]" not in heads
    assert "acc_mean" in swept.read("main") and "\\begin{table*}" in swept.read("main", "tex")
    bad = swept.table(*arguments, "table.columns=[metod]")
    assert bad.code == 1 and "table.columns: got metod; did you mean method" in bad.err


def test_a_tex_engine_takes_the_tables(rows, tmp_path):
    paths = [sheet.write(layout(n)(rows), tmp_path / n)[2] for n in ("codings", "energy", "main")]
    compile_latex(paths)
