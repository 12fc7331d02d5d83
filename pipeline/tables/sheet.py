"""A table that is ready to be written: the same bytes for the same numbers, as md, csv and tex."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from pipeline.results import uncertainty
from pipeline.results.columns import UNDEFINED, Column
from pipeline.tables import latex

WIDTH = 120  # characters of a line on a terminal
NARROW = 14  # to which a column of words may shrink
GAP = "  "  # between two columns on a terminal


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
        """Which cells are the best of their column and section; what looks alike is alike.

        A value with an error is the best only where its interval is clear of every other's.
        """
        marked = [[False] * len(self.columns) for _ in range(len(self.frame))]
        texts = self.texts()
        competing = [i for i, rival in enumerate(self.rivals) if rival]
        for place, column in enumerate(self.columns):
            if column.best is None:
                continue
            best = self._clear if column.ratio else self._best
            for section in dict.fromkeys(self.sections):
                known = [i for i in competing if self.sections[i] == section]
                known = [i for i in known if texts[i][place] != UNDEFINED]
                if len(known) > 1:  # alone it is better than nothing
                    for i in best(column, known, [row[place] for row in texts]):
                        marked[i][place] = True
        return marked

    def _best(self, column: Column, known: Sequence[int], texts: Sequence[str]) -> list[int]:
        """The rows of the best value, and of those that look like it."""
        better = min if column.best == "min" else max
        winner = better(known, key=list(self.frame[column.name]).__getitem__)
        return [i for i in known if texts[i] == texts[winner]]

    def _clear(self, column: Column, known: Sequence[int], texts: Sequence[str]) -> list[int]:
        """The row whose interval ends before any other of the rows' begins; none where one is unknown."""
        low, high = uncertainty.interval(self.frame, column.name, column.ratio)
        near, far = (low, high) if column.best == "min" else (-high, -low)
        winner = min(known, key=lambda i: far.iloc[i])
        clear = all(far.iloc[winner] < near.iloc[i] for i in known if i != winner)
        return [winner] if clear else []

    @property
    def note(self) -> str:
        """A line under the table where its rows were computed in different environments."""
        if "environment" not in self.frame:
            return ""
        rows = [str(row).split("; ") for row in self.frame["environment"].dropna()]
        every = list(dict.fromkeys(place for row in rows for place in row))
        if len(every) < 2:
            return ""
        mixed = sum(len(row) > 1 for row in rows)
        mixing = f", {mixed} of the rows in several" if mixed else ""
        return f"Computed in different environments{mixing}: {'; '.join(every)}."

    def starts(self) -> list[bool]:
        """Which rows begin a section, the first aside."""
        pairs = zip(self.sections[1:], self.sections[:-1], strict=True)
        return [False, *(a != b for a, b in pairs)] if self.sections else [False] * len(self.frame)


def write(sheet: Sheet, stem: Path, wide: bool = False) -> list[Path]:
    """Writes stem.md, stem.csv and stem.tex, the last across both columns of a page if `wide`.

    The csv holds the numbers as they are, the other two what a reader wants to see.
    """
    said = replace(sheet, columns=[c for c in sheet.columns if not _in_caption(sheet, c)])
    texts = {
        ".md": "\n\n".join(filter(None, [sheet.caption, markdown(sheet), sheet.note])) + "\n",
        ".csv": sheet.frame.to_csv(index=False, lineterminator="\n"),
        ".tex": latex.table(
            [(column.group, column.head) for column in said.columns],
            [column.words for column in said.columns],
            said.texts(),
            said.bold(),
            said.starts(),
            stem.name,
            f"{sheet.caption} {sheet.note}".strip(),
            wide,
        ),
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, text in texts.items():
        path = stem.with_name(stem.name + suffix)
        path.write_text(text, encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


def _in_caption(sheet: Sheet, column: Column) -> bool:
    """Whether a column says of every row the one model that the caption names."""
    models = set(sheet.frame[column.name]) if column.name == "model" else set()
    return len(models) == 1 and len(sheet.columns) > 1 and f" {min(models)} " in sheet.caption


def markdown(sheet: Sheet) -> str:
    """A pipe table."""
    rows = [
        [f"**{text}**" if mark else text for text, mark in zip(texts, marks, strict=True)]
        for texts, marks in zip(sheet.texts(), sheet.bold(), strict=True)
    ]
    rows = [[text.replace("|", r"\|") for text in row] for row in rows]
    heads = [f"{column.group}: {column.head}".removeprefix(": ") for column in sheet.columns]
    return _tabulated(sheet.columns, heads, rows, "pipe")


def printed(sheet: Sheet, width: int | None = None) -> str:
    """A sheet for a terminal, its caption below it; no line is longer than `width`.

    Without one a line has 120 characters, or as many as the terminal has room for.
    """
    width = width or max(WIDTH, shutil.get_terminal_size().columns)
    table, left_out = _fitting(sheet, width)
    parts = [f"No room for {', '.join(left_out)}: the csv has all."] if left_out else []
    parts += [text for text in (sheet.note, sheet.caption) if text]
    below = [textwrap.fill(text, width, break_on_hyphens=False) for text in parts]
    return "\n".join([table, *below])


def _fitting(sheet: Sheet, width: int) -> tuple[str, list[str]]:
    """The table, and the names of the columns that it leaves out for want of room.

    Heads are broken into lines first, then words; then columns go, those of a higher `spare` and on
    the right first.
    """
    columns, left_out = list(sheet.columns), []
    cells = {column.name: column.texts(sheet.frame) for column in columns}
    widths, room = _widths(columns, cells), width - len(GAP) * (len(columns) - 1)
    broken = sum(widths) > room
    while sum(least := _widths(columns, cells, broken)) > room:
        if all(column.words for column in columns):
            break
        leaving = max(columns, key=lambda c: (not c.words, c.spare, columns.index(c)))
        left_out.append(leaving.name)
        columns.remove(leaving)
        room += len(GAP)
    widths = [
        w if c.words else b for c, w, b in zip(columns, _widths(columns, cells), least, strict=True)
    ]
    while sum(widths) > room and widths != least:
        widest = max(range(len(widths)), key=lambda i: widths[i] - least[i])
        widths[widest] -= 1
    shown = [
        [_broken(text, limit) if column.words else text for text in cells[column.name]]
        for column, limit in zip(columns, widths, strict=True)
    ]
    # Heads are rows, because tabulate would set them two characters wider.
    rows = [*_heads(columns, widths), ["-" * limit for limit in widths], *zip(*shown, strict=True)]
    return _tabulated(columns, (), rows, "plain"), left_out


def _widths(
    columns: Sequence[Column], cells: Mapping[str, Sequence[str]], broken: bool = False
) -> list[int]:
    """Characters that columns take; `broken`: with heads and words in as many lines as need be. A group
    stands above its first column alone."""
    widths = []
    before = ["", *(column.group for column in columns)]
    for column, last in zip(columns, before, strict=False):
        widest = max((len(text) for text in cells[column.name]), default=0)
        if broken and column.words:
            widest = min(widest, NARROW)
        group = column.group if column.group != last else ""
        head = f"{group} {column.head}".split(" ") if broken else [group, column.head]
        widths.append(max(widest, *map(len, head)))
    return widths


def _heads(columns: Sequence[Column], widths: Sequence[int]) -> list[tuple[str, ...]]:
    """The lines of the heads, the last ones beside each other; a group is above its first column."""
    before = ["", *(column.group for column in columns)]
    lines = []
    for column, last, width in zip(columns, before, widths, strict=False):
        group = [column.group] if column.group not in ("", last) else []
        lines.append([*group, *(textwrap.wrap(column.head, width) or [""])])
    tallest = max(map(len, lines))
    return list(zip(*([""] * (tallest - len(each)) + each for each in lines), strict=True))


def _broken(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)) or text


def _tabulated(
    columns: Sequence[Column], heads: Sequence[str], rows: Sequence[Sequence[str]], style: str
) -> str:
    # tabulate would read the text as numbers again and undo the format of each column
    align = ["left" if column.words else "right" for column in columns]
    return tabulate(rows, heads, style, disable_numparse=True, colalign=align if rows else None)
