"""Figures are drawn once of the same content, and again where any of it has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from pipeline.figures import kept
from pipeline.figures.kept import Kept
from pipeline.results.folders import NEUROBENCH, SITES, RunFolder
from pipeline.run.measured import KINDS, PARTS

RESULT = {
    "label": "a",
    "ppl_text": float("inf"),
    "keys": {"fitting": "f" * 32},
    "hits": {"fitting": False},
    "run": {"id": "first", "overrides": ["coding=las"], "started": 1.0},
}


class Drawn:
    """Draws a figure of two kinds, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, Figure]:
        self.times += 1
        figures = {"second": Figure((1, 1)), "first": Figure((1, 1))}
        for number, figure in enumerate(figures.values()):
            figure.subplots().plot([0, 1 + number])
        return figures


@pytest.fixture
def store(tmp_path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def job(folder: Path, store: Path, result=RESULT) -> RunFolder:
    """The folder of a job with a file of every kind that a figure may be of."""
    made = RunFolder(folder)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/config.yaml").write_text(f"store: {{path: {store}}}\ncoding: 1\n")
    frame = pd.DataFrame({"site": ["a"], "nmse": [0.5]})
    made.leave(result, frame, {KINDS: frame, PARTS: frame}, {"a": 1})
    return made


def save(folder: RunFolder, draw: Drawn, into: Path) -> dict[str, bytes]:
    into.mkdir()
    files = Kept({folder: folder.result}, ("png", "pdf")).save(
        draw, lambda kind: into / f"n_{kind}"
    )
    names = [f"n_{kind}.{suffix}" for kind in ("second", "first") for suffix in ("png", "pdf")]
    assert [file.name for file in files] == names and all(file.parent == into for file in files)
    return {file.name: file.read_bytes() for file in files}


def test_a_run_that_measures_the_same_draws_nothing(store, tmp_path):
    draw = Drawn()
    first = save(job(tmp_path / "1", store), draw, tmp_path / "one")
    later = RESULT | {"hits": {"fitting": True}}
    later |= {"run": {"id": "second", "overrides": ["coding=las"], "started": 2.0}}
    again = save(job(tmp_path / "2", store, later), draw, tmp_path / "two")
    assert draw.times == 1 and again == first and len(set(first.values())) == 4


CHANGES = {
    "a number": lambda folder: change(folder, ppl_text=3.0),
    "an artifact": lambda folder: change(folder, keys={"fitting": "e" * 32}),
    "an override": lambda folder: change(folder, run={"overrides": ["coding=oat"]}),
    **{
        name: lambda folder, name=name: (folder / name).write_bytes(b"changed")
        for name in (SITES, KINDS, PARTS, NEUROBENCH)
    },
    "the configuration": lambda folder: append(folder / ".hydra/config.yaml", "more: 2\n"),
}


def change(folder: Path, **fields) -> None:
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | fields))


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_drawn_again(what, store, tmp_path):
    draw = Drawn()
    save(job(tmp_path / "1", store), draw, tmp_path / "one")
    changed = job(tmp_path / "2", store)
    CHANGES[what](changed.path)
    save(changed, draw, tmp_path / "two")
    assert draw.times == 2


def test_other_sources_draw_again(store, tmp_path, monkeypatch):
    draw = Drawn()
    folder = job(tmp_path / "1", store)
    save(folder, draw, tmp_path / "one")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/one.py").write_text("x = 1\n")
    monkeypatch.setattr(kept.provenance, "ROOT", tmp_path)
    for times, text in enumerate(("x = 1\n", "x = 2\n", "x = 1\n")):
        (tmp_path / "pipeline/one.py").write_text(text)
        kept._sources.cache_clear()
        save(folder, draw, tmp_path / f"again{times}")
    kept._sources.cache_clear()
    assert draw.times == 3  # as before, and of two texts


def test_a_damaged_file_is_drawn_again(store, tmp_path):
    draw = Drawn()
    folder = job(tmp_path / "1", store)
    first = save(folder, draw, tmp_path / "one")
    (file,) = store.glob("figures/*/first.png")
    file.write_bytes(b"damaged")
    assert save(folder, draw, tmp_path / "two") == first and draw.times == 2


def test_without_a_store_figures_are_drawn_and_nothing_is_made(tmp_path):
    draw = Drawn()
    folder = job(tmp_path / "1", tmp_path / "nowhere")
    first = save(folder, draw, tmp_path / "one")
    assert save(folder, draw, tmp_path / "two") == first and draw.times == 2
    assert not (tmp_path / "nowhere").exists()
