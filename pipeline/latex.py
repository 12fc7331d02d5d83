"""Booktabs tables in LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

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
# As wide as it is, or as the line if that is narrower.
FIT = "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%"


def table(
    heads: Sequence[tuple[str, str]],
    words: Sequence[bool],
    rows: Sequence[Sequence[str]],
    bold: Sequence[Sequence[bool]],
    starts: Sequence[bool],
    label: str,
    caption: str,
) -> str:
    """A table environment, or a longtable where a page has no room for all rows.

    `heads` are pairs of the group that several columns have in common, or "", and the head of one;
    a rule stands before the rows that `starts` marks.
    """
    columns = "".join("l" if left else "r" for left in words)
    head = f"\\toprule\n{_head(heads)}\\midrule\n"
    body = ""
    for texts, marks, start in zip(rows, bold, starts, strict=True):
        cells = " & ".join(cell(t, m) for t, m in zip(texts, marks, strict=True))
        body += ("\\midrule\n" if start else "") + f"{cells} \\\\\n"
    told = f"\\caption{{{escaped(caption)}}}\\label{{tab:{label}}}"
    if len(rows) > PAGE:
        size = "tiny" if len(columns) > 12 else "scriptsize"
        return (
            "% needs \\usepackage{booktabs,longtable}\n"
            f"\\begingroup\\{size}\\setlength{{\\tabcolsep}}{{3pt}}\n"
            f"\\begin{{longtable}}{{{columns}}}\n{told}\\\\\n"
            f"{head}\\endfirsthead\n{head}\\endhead\n\\bottomrule\n\\endfoot\n{body}"
            "\\end{longtable}\n\\endgroup\n"
        )
    return (
        "% needs \\usepackage{booktabs,graphicx}\n"
        f"\\begin{{table}}\n\\centering\n{told}\n{FIT}\n"
        f"\\begin{{tabular}}{{{columns}}}\n{head}{body}\\bottomrule\n\\end{{tabular}}%\n}}\n"
        "\\end{table}\n"
    )


def _head(heads: Sequence[tuple[str, str]]) -> str:
    """One line of heads, and above it one of their groups with a rule under each, if there are any."""
    above, rules, place = [], [], 1
    for group, columns in groupby(group for group, _ in heads):
        width = len(list(columns))
        if group:
            above.append(f"\\multicolumn{{{width}}}{{c}}{{{escaped(group)}}}")
            rules.append(f"\\cmidrule(lr){{{place}-{place + width - 1}}}")
        else:
            above += [""] * width
        place += width
    line = " & ".join(escaped(head) for _, head in heads) + " \\\\\n"
    return f"{' & '.join(above)} \\\\\n{' '.join(rules)}\n{line}" if rules else line


def cell(text: str, bold: bool = False) -> str:
    """The text of a cell; 4.5e7, >1e4, inf and a minus as mathematics."""
    if found := POWER.fullmatch(text):
        sign, number, exponent = found.groups()
        power = f"10^{{{exponent}}}" if number == "1" else f"{number}\\times10^{{{exponent}}}"
        return f"$\\mathbf{{{sign}{power}}}$" if bold else f"${sign}{power}$"
    if text == "inf":
        return r"$\infty$"
    plain = re.sub(r"^-(?=\d)", "$-$", escaped(text))
    return f"\\textbf{{{plain}}}" if bold else plain


def escaped(text: str) -> str:
    """Plain text with what LaTeX would read otherwise escaped."""
    return text.translate(ESCAPES)
