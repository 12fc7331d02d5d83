"""Booktabs tables in LaTeX: pandas' Styler sets them, with what it cannot do put in here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pandas as pd

PAGE = 45  # rows that fit on a page; more are set as a longtable, which breaks between pages
ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "–": "--",
        "±": r"$\pm$",
    }
)
POWER = re.compile(r"(>?)(-?\d(?:\.\d+)?)e(-?\d+)")
SMALL = "\\small\\setlength{\\tabcolsep}{3pt}\n"
# As wide as it is, or as the column of the page if that is narrower.
FIT = "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"


def table(
    heads: Sequence[tuple[str, str]],
    words: Sequence[bool],
    rows: Sequence[Sequence[str]],
    bold: Sequence[Sequence[bool]],
    starts: Sequence[bool],
    label: str,
    caption: str,
    wide: bool = False,
) -> str:
    """A table environment, or a longtable where a page has no room for all rows.

    `heads` are pairs of the group that several columns have in common, or "", and the head of one;
    a rule stands before the rows that `starts` marks. `wide`: across both columns of a page, which
    a longtable knows nothing of.
    """
    long = len(rows) > PAGE
    caption = escaped(caption)
    pairs = zip(rows, bold, strict=True)
    body = [[cell(t, m) for t, m in zip(*pair, strict=True)] for pair in pairs]
    for texts, start in zip(body, starts, strict=True):  # Styler has no rules between rows
        texts[0] = f"\\midrule\n{texts[0]}" if start else texts[0]
    grouped = any(group for group, _ in heads)
    names = [(escaped(group), escaped(head)) for group, head in heads]
    columns: Any = pd.MultiIndex.from_tuples(names)
    columns = columns if grouped else columns.droplevel(0)
    styler = pd.DataFrame(body, columns=columns, dtype=object).style.hide(axis="index")
    text: str = styler.to_latex(
        column_format="".join("l" if left else "r" for left in words),
        hrules=True,
        multicol_align="c",
        label=f"tab:{label}",
        caption=caption,
        environment="longtable" if long else "table*" if wide else "table",
        position_float=None if long else "centering",
    )
    text = _under_groups(text, [group for group, _ in heads]) if grouped else text
    return _long(text, caption, len(words)) if long else _fitted(text)


def _under_groups(text: str, groups: Sequence[str]) -> str:
    """The table with a rule under every group of heads, for which Styler has no option."""
    rules, place = [], 1
    for group, columns in groupby(groups):
        width = len(list(columns))
        if group:
            rules.append(f"\\cmidrule(lr){{{place}-{place + width - 1}}}")
        place += width
    above = re.compile(r"(\\toprule\n.*\\\\\n)")
    return above.sub(lambda match: f"{match[0]}{' '.join(rules)}\n", text)


def _fitted(text: str) -> str:
    """The table no wider than the column of the page: Styler sets it as wide as its cells are."""
    text = text.replace("\\begin{tabular}", f"{SMALL}{FIT}\\begin{{tabular}}")
    text = text.replace("\\end{tabular}\n", "\\end{tabular}%\n}\n")
    return f"% needs \\usepackage{{booktabs,graphicx}}\n{text}"


def _long(text: str, caption: str, columns: int) -> str:
    """The longtable in small type, with its caption on the first page alone."""
    size = "tiny" if columns > 12 else "scriptsize"
    text = text.replace(f"\\caption[]{{{caption}}} \\\\\n", "")
    return (
        "% needs \\usepackage{booktabs,longtable}\n"
        f"\\begingroup\\{size}\\setlength{{\\tabcolsep}}{{3pt}}\n{text}\\endgroup\n"
    )


def cell(text: str, bold: bool = False) -> str:
    """The text of a cell; 4.5e7, >1e4, inf and a minus as mathematics, which Styler's escape is not."""
    if match := POWER.fullmatch(text):
        sign, number, exponent = match.groups()
        power = f"10^{{{exponent}}}" if number == "1" else f"{number}\\times10^{{{exponent}}}"
        return f"$\\mathbf{{{sign}{power}}}$" if bold else f"${sign}{power}$"
    if text == "inf":
        return r"$\infty$"
    plain = re.sub(r"^-(?=\d)", "$-$", escaped(text))
    return f"\\textbf{{{plain}}}" if bold else plain


def escaped(text: str) -> str:
    """Plain text with what LaTeX would read otherwise escaped."""
    return text.translate(ESCAPES)
