"""The report: one page that needs nothing else, with the numbers of its tables and their origins."""

from __future__ import annotations

import base64
import io
import re
import shlex
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pipeline.commands import page as page_of
from pipeline.commands.cli import main
from pipeline.results import lookup
from pipeline.run import models
from pipeline.run.jobs import jobs
from pipeline.run.shipped import leaves
from pipeline.tables import paper
from tests.pipeline.conftest import CONF, Finished, Tiny

STUDIES = paper.names("study")
ROWS = "rows=dense,las,gated2"
STUDY = (
    *("study=quickstart", ROWS, "study.experiments.quickstart=[main,energy]"),
    "study.about='<b>odd & \"quoted\"</b>'",
)


class Page(HTMLParser):
    """Cells of tables by figure, the sources and links of the page, and its words."""

    def __init__(self, text: str):
        super().__init__()
        self.figure, self.cell, self.words = "", False, ""
        self.tables: dict[str, list[list[str]]] = {}
        styles = "".join(part.partition("</style>")[0] for part in text.split("<style")[1:])
        rules = (rule.partition("{") for rule in styles.split("}"))
        style = " ".join(ids for ids, _, looks in rules if "font-weight: bold" in looks)
        self.strong, self.bold = set(re.findall(r"#([\w-]+)", style)), set[str]()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [str(found[name]) for name in ("src", "href") if name in found]
        if tag == "figure":
            self.figure = found.get("id") or ""
        if tag == "tr":
            self.tables.setdefault(self.figure, []).append([])
        if tag in ("td", "th"):
            self.cell, self.id = True, found.get("id")
            self.tables[self.figure][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")
        self.figure = "" if tag == "figure" else self.figure

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.cell:
            self.tables[self.figure][-1][-1] += data
            if self.id in self.strong:
                self.bold.add(data)


def made(folder: Path, *arguments: str) -> Finished:
    out, err = io.StringIO(), io.StringIO()
    with chdir(folder), redirect_stdout(out), redirect_stderr(err):
        code = main(["report", *arguments])
    return Finished(code, out.getvalue(), err.getvalue(), folder)


def page(folder: Path) -> Path:
    """The one report below a folder."""
    (file,) = folder.glob("outputs/reports/*.html")
    assert re.fullmatch("quickstart_tiny_[0-9a-f]{8}", file.stem)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory, command: Callable[..., Finished]) -> Path:
    folder = tmp_path_factory.mktemp("report")
    done = command(folder, "experiment=quickstart", ROWS, "evaluation.tasks=[piqa]")
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def overrides(tiny_run: Tiny) -> list[str]:
    return [*tiny_run.overrides, "evaluation.tasks=[piqa]", "runtime.figures=true"]


@pytest.fixture(scope="module")
def text(folder, overrides) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", None)  # nothing loads a model
        done = made(folder, *STUDY, *overrides)
    assert done.code == 0, done.err
    return page(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows(folder, overrides) -> list[lookup.Row]:
    with chdir(folder):
        return lookup.rows(["experiment=quickstart", ROWS, *overrides])


def test_the_page_needs_nothing_else(text):
    page = Page(text)
    anchors = set(re.findall(r'id="([^"]+)"', text))
    for link in page.links:
        assert link.startswith("data:image/png;base64,") or link[1:] in anchors, link[:60]
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert not re.search(
        r"https?:|@import|url\(", re.sub(r"<script.*?</script>", "", text, flags=re.S)
    )


def test_the_figures_are_those_of_a_sweep(text):
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    page = Page(text)
    drawn = ("ppl_energy", "saving_spikes", "energy_parts", "levels", "error_per_layer")
    for caption in (*drawn, "spike_rate_per_layer"):
        assert page_of.FIGURES[caption] in page.words
    assert len(pictures) == 6


def test_the_tables_are_those_of_the_tables_command(text, folder, overrides):
    arguments = ("experiment=quickstart", ROWS, *overrides)
    tables = Page(text).tables
    for name in ("main", "energy"):
        with chdir(folder), redirect_stdout(io.StringIO()):
            assert main(["table", name, *arguments]) == 0
        (file,) = folder.glob(f"outputs/tables/paper/{name}_*.md")
        lines = file.read_text().splitlines()
        cells = [line.strip("|").split("|") for line in lines if line.startswith("|")]
        expected = [[cell.strip().strip("*") for cell in line] for line in cells[2:]]
        assert tables[f"quickstart-{name}"][-len(expected) :] == expected
    bold = {cell.strip().strip("*") for line in cells for cell in line if "**" in cell}
    assert bold and bold <= Page(text).bold


def test_text_of_the_configuration_is_escaped(text):
    assert "<b>" not in text and "&lt;b&gt;odd &amp; &#34;quoted&#34;&lt;/b&gt;" in text


def test_shared_and_different_configuration_make_the_whole(rows):
    common, different = page_of.configurations([row.job.config for row in rows])
    shared = leaves(yaml.safe_load(common))
    for row, own in zip(rows, different, strict=True):
        whole: Any = OmegaConf.to_container(row.job.config, resolve=True)
        assert shared | own == leaves(whole) and not set(shared) & set(own)
    assert {own["row"] for own in different} == {"dense", "las", "gated2"}
    assert shared["model.name"] == "tiny" and "coding.grains" not in shared


def test_every_row_tells_how_to_make_it_again(text, rows, folder):
    page = Page(text)
    for row in rows:
        for key in row.result["keys"].values():
            assert key in page.words
    commands = re.findall(r"^python -m pipeline .*hydra.mode=RUN$", page.words, re.MULTILINE)
    assert len(commands) == len(rows)
    for command, row in zip(commands, rows, strict=True):
        (job,) = jobs(shlex.split(command)[3:-1])
        with chdir(folder):
            (again,) = lookup.rows(job.overrides)
        assert again.result["keys"] == row.result["keys"]
    manifest = rows[1].run.artifacts["fitting"].manifest
    assert f"torch {manifest['versions']['torch']}" in page.words
    assert page_of.revision(manifest["git"]) in page.words


def test_the_same_store_gives_the_same_page(text, folder, overrides):
    again = made(folder, *STUDY, *overrides)
    assert again.code == 0
    assert page(folder).read_text(encoding="utf-8") == text


def test_missing_rows_of_all_experiments_are_named(tmp_path, overrides):
    experiments = ("+study.experiments.main_table=[grains]", "timesteps=4", "transform=none")
    done = made(tmp_path, *STUDY, *experiments, *overrides)
    assert done.code == 1 and not (tmp_path / "outputs").exists()
    for name in ("quickstart", "main_table"):
        assert f"{name}: 3 of 3 rows are not in outputs/store" in done.err
    assert "dense lacks evaluation ppl_wikipedia, evaluation acc_piqa, energy;" in done.err
    assert done.err.count("\n") == 2 * len(("quickstart", "main_table")) + 1
    last = done.err.splitlines()[-1]
    assert "python -m pipeline report quickstart" in last and "study.fill=true" in last


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_names_experiments_and_tables_that_there_are(name):
    study = paper.loaded("study", name, [])
    assert set(study) == {"title", "about", "fill", "folder", "experiments"}
    for experiment, tables in study.experiments.items():
        assert (CONF / "experiment" / f"{experiment}.yaml").exists()
        for table in tables:
            assert callable(instantiate(paper.loaded("table", table, []).layout))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["study=zzz"], f"got study=zzz; choose among {', '.join(STUDIES)}"),
        ([], "got no study; give one NAME out of main"),
        (["study=main", "study.zzz=1"], "zzz"),
        (["study=main", "experiment=codings"], "the experiments of study=main are in its file"),
        (["study=quickstart", "study.experiments.quickstart=[zzz]"], "zzz"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(arguments, told, tmp_path):
    done = made(tmp_path, *arguments)
    assert done.code == 1 and told in done.err and done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_lists_the_studies(tmp_path):
    done = made(tmp_path, "--help")
    assert done.code == 0 and all(name in done.out for name in STUDIES)


def test_a_revision_is_told_with_its_changes():
    assert (
        page_of.revision({"revision": "0123456789abcdef", "dirty": True})
        == "0123456789ab with changes"
    )
    assert page_of.revision({"revision": None, "dirty": None}) == "unknown to git"
