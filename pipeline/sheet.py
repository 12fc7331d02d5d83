"""A table that is ready to be written: the same bytes for the same numbers, as md, csv and tex."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from pipeline import latex
from pipeline.columns import UNDEFINED, Column


@dataclass(frozen=True)
class Sheet:
    """A frame, which is the csv, and what of it a reader sees.

    `sections` has a value for every row: where it changes a rule stands, and among the rows of one
    value that `rivals` marks the best of every column is bold.
    """

    frame: pd.DataFrame
    columns: Sequence[Column]
    caption: str
    sections: Sequence[Hashable] = ()
    rivals: Sequence[bool] = ()

    def texts(self) -> list[list[str]]:
        """The cells by row."""
        by_column = [column.texts(self.frame) for column in self.columns]
        return [list(row) for row in zip(*by_column, strict=True)]

    def bold(self) -> list[list[bool]]:
        """Which cells are the best of their column and section; what looks alike is alike."""
        marked = [[False] * len(self.columns) for _ in range(len(self.frame))]
        texts = self.texts()
        competing = [i for i, rival in enumerate(self.rivals) if rival]
        for place, column in enumerate(self.columns):
            if column.best is None:
                continue
            values, better = list(self.frame[column.name]), min if column.best == "min" else max
            for section in dict.fromkeys(self.sections):
                known = [i for i in competing if self.sections[i] == section]
                known = [i for i in known if texts[i][place] != UNDEFINED]
                if len(known) > 1:  # alone it is better than nothing
                    winner = better(known, key=values.__getitem__)
                    for i in known:
                        marked[i][place] = texts[i][place] == texts[winner][place]
        return marked

    def starts(self) -> list[bool]:
        """Which rows begin a section, the first aside."""
        pairs = zip(self.sections[1:], self.sections[:-1], strict=True)
        return [False, *(a != b for a, b in pairs)] if self.sections else [False] * len(self.frame)


def write(sheet: Sheet, stem: Path) -> list[Path]:
    """Writes stem.md, stem.csv and stem.tex.

    The csv holds the numbers as they are, the other two what a reader wants to see.
    """
    words = [column.words for column in sheet.columns]
    texts = {
        ".md": f"{sheet.caption}\n\n{markdown(sheet)}\n",
        ".csv": sheet.frame.to_csv(index=False, lineterminator="\n"),
        ".tex": latex.table(
            [(column.group, column.head) for column in sheet.columns],
            words,
            sheet.texts(),
            sheet.bold(),
            sheet.starts(),
            stem.name,
            sheet.caption,
        ),
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, text in texts.items():
        path = stem.with_name(stem.name + suffix)
        path.write_text(text, encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


def markdown(sheet: Sheet) -> str:
    """A pipe table."""
    rows = [
        [f"**{text}**" if mark else text for text, mark in zip(texts, marks, strict=True)]
        for texts, marks in zip(sheet.texts(), sheet.bold(), strict=True)
    ]
    rows = [[text.replace("|", r"\|") for text in row] for row in rows]
    return _tabulated(sheet, rows, "pipe")


def terminal(sheet: Sheet) -> str:
    """The same for a terminal."""
    return _tabulated(sheet, sheet.texts(), "simple")


def _tabulated(sheet: Sheet, rows: list[list[str]], style: str) -> str:
    # tabulate would read the text as numbers again and undo the format of each column
    heads = [f"{column.group}: {column.head}".removeprefix(": ") for column in sheet.columns]
    align = ["left" if column.words else "right" for column in sheet.columns]
    return tabulate(rows, heads, style, disable_numparse=True, colalign=align if rows else None)
