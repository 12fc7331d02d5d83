"""LaTeX that is written: parsed strictly, compiled where there is an engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from pylatexenc.latexwalker import LatexEnvironmentNode, LatexWalker

from pipeline.results.columns import Column, bounded_perplexity
from pipeline.tables import latex, sheet

STYLES = ("booktabs", "graphicx", "longtable")  # what the tables say that they need


def check_latex(path: Path) -> None:
    """Parses strictly, with rules, and as many cells in every row as there are columns."""
    text = path.read_text(encoding="utf-8")
    nodes, _, _ = LatexWalker(text, tolerant_parsing=False).get_latex_nodes()
    (outer,) = [n for n in nodes if isinstance(n, LatexEnvironmentNode)]
    assert outer.environmentname in ("table", "table*", "longtable")
    kind = "longtable" if outer.environmentname == "longtable" else "tabular"
    assert text.count(f"\\begin{{{kind}}}") == text.count(f"\\end{{{kind}}}") == 1
    (columns,) = re.findall(rf"\\begin{{{kind}}}{{([lr]+)}}", text)
    rules = [text.count(f"\\{rule}") for rule in ("toprule", "bottomrule")]
    assert rules == ([2, 1] if kind == "longtable" else [1, 1])
    body = text[text.index("\\toprule") : text.index(f"\\end{{{kind}}}")]
    bare = re.sub(r"\\[&%$#_{}]", "", body)
    lines = [line for line in bare.splitlines() if "&" in line or line.endswith("\\\\")]
    for line in lines:
        spans = [int(width) - 1 for width in re.findall(r"\\multicolumn{(\d+)}", line)]
        assert line.count("&") + 1 + sum(spans) == len(columns) and line.endswith("\\\\"), line
        assert line.count("$") % 2 == 0
    assert len(lines) > 1 and "%" not in bare.replace("%\n", "")


def compile_latex(paths: Sequence[Path]) -> None:
    """Sets the tables of a folder on pages of their own document; skips without what that takes."""
    engine = shutil.which("pdflatex") or shutil.which("tectonic")
    if engine is None:
        pytest.skip("no TeX engine")
    if engine.endswith("pdflatex") and (missing := missing_styles(STYLES)):
        pytest.skip(f"no TeX engine that has {', '.join(missing)}")
    main = paths[0].with_name("document.tex")
    packages = f"\\usepackage{{{','.join(STYLES)}}}"
    tables = "".join(f"\\input{{{path.stem}}}" for path in paths)
    main.write_text(
        f"\\documentclass{{article}}{packages}\\begin{{document}}{tables}\\end{{document}}"
    )
    flags = ["-interaction=nonstopmode", "-halt-on-error"] if engine.endswith("pdflatex") else []
    command = [engine, *flags, main.name]
    done = subprocess.run(command, cwd=main.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert main.with_suffix(".pdf").stat().st_size > 10_000


def missing_styles(names: Sequence[str]) -> list[str]:
    """The styles that pdflatex would not find: a small TeX has no booktabs. tectonic fetches its."""
    return [
        name
        for name in names
        if subprocess.run(["kpsewhich", f"{name}.sty"], capture_output=True).returncode != 0
    ]


def long_sheet(count: int) -> sheet.Sheet:
    frame = pd.DataFrame({"a_b": ["x_1 & 50%"] * count, "ppl": [-1.5, 2e9] * (count // 2)})
    columns = [
        Column("a_b", "name [%]", words=True, group="G_1"),
        Column("ppl", "p", bounded_perplexity, "min"),
    ]
    return sheet.Sheet(frame, columns, "A_b & c.", [0] * count, [True] * count)


@pytest.mark.parametrize("count", [4, 60])
def test_long_tables_go_on_over_pages(count, tmp_path):
    path = sheet.write(long_sheet(count), tmp_path / "long_one")[2]
    check_latex(path)
    text = path.read_text()
    assert ("longtable" in text) == (count == 60)
    assert text.count(r"\textbf{$-$1.50}") == count // 2 and r"$>10^{4}$" in text
    assert "\nG\\_1 &  \\\\\n" in text and r"\cmidrule(lr){1-1}" in text


@pytest.mark.parametrize("broken", ["\\end{tabular}", "\\bottomrule", " & ", "}", "$", "\\\\\n"])
def test_the_check_of_latex_notices_a_broken_table(broken, tmp_path):
    path = sheet.write(long_sheet(4), tmp_path / "t")[2]
    text = path.read_text()
    at = text.index(broken, text.index("\\midrule"))
    path.write_text(text[:at] + text[at + len(broken) :])
    with pytest.raises(Exception) as caught:
        check_latex(path)
    assert (
        isinstance(caught.value, AssertionError | ValueError) or "latex" in caught.typename.lower()
    )


@pytest.mark.parametrize(("count", "needed"), [(4, STYLES[:2]), (60, ("booktabs", "longtable"))])
def test_a_table_says_which_styles_it_needs(count, needed, tmp_path):
    text = sheet.write(long_sheet(count), tmp_path / "t")[2].read_text()
    assert f"% needs \\usepackage{{{','.join(needed)}}}\n" in text


def test_a_style_that_a_small_tex_lacks_is_missing(tmp_path, monkeypatch):
    kpsewhich = tmp_path / "kpsewhich"
    kpsewhich.write_text('#!/bin/sh\ntest "$1" = graphicx.sty\n')
    kpsewhich.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert missing_styles(STYLES) == ["booktabs", "longtable"]


@pytest.mark.parametrize("count", [4, 60])
def test_a_tex_engine_takes_short_and_long_tables(count, tmp_path):
    compile_latex([sheet.write(long_sheet(count), tmp_path / "t")[2]])


@pytest.mark.parametrize(
    ("text", "plain", "bold"),
    [
        ("20.1", "20.1", r"\textbf{20.1}"),
        ("-82.1", "$-$82.1", r"\textbf{$-$82.1}"),
        ("3.1e-4", r"$3.1\times10^{-4}$", r"$\mathbf{3.1\times10^{-4}}$"),
        (">1e4", r"$>10^{4}$", r"$\mathbf{>10^{4}}$"),
        ("inf", r"$\infty$", r"$\infty$"),
        ("a_b & 5 ± 1", r"a\_b \& 5 $\pm$ 1", r"\textbf{a\_b \& 5 $\pm$ 1}"),
        (
            r"\c{x}^~–<",
            r"\textbackslash{}c\{x\}\textasciicircum{}\textasciitilde{}--\textless{}",
            None,
        ),
    ],
)
def test_cells_are_escaped_and_powers_are_set(text, plain, bold):
    assert latex.cell(text) == plain
    assert bold is None or latex.cell(text, bold=True) == bold
