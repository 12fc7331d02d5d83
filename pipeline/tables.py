"""Turn the results of runs into one table: on the terminal, and as Markdown, csv and LaTeX."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.rows import TEXT, distinct, energy_frame, result_frame, sweep_results

UNDEFINED = "–"
DIVERGED = 1e4  # a perplexity above this says only that the model is broken
LEFT = (*TEXT, "run", "phase", "role")  # columns of words
CAPTIONS = {
    "bits": "bits: T, and log2 n where the n grains are neurons per activation",
    "nmse": "nmse: geometric mean over the sites, on held-out activations",
    "convention": "convention: how the spikes of a value are counted",
    "spikes_per_value": "spikes_per_value: weighted by fan-out",
    "macs_G": "macs_G to saving: the causal convention, saving against the dense model",
    "fitting_s": "fitting_s: all sites, with the statistics that the coding asks for",
    "conversion_s": "conversion_s: capture to patching; seconds are those of the computation",
}
ENERGY_CAPTION = (
    "Energy by convention (paper: full attention square, one spiking operand a product; causal: "
    "unmasked positions, both operands, gates and decode scaling) and phase (prefill of a window; "
    "one decoded token at its end); saving against the dense model in the same convention."
)
_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        UNDEFINED: "--",
        "±": r"$\pm$",
    }
)


def write(frame: pd.DataFrame, stem: Path, caption: str) -> list[Path]:
    """Write `frame` as stem.md, stem.csv and stem.tex; the same frame gives the same bytes.

    The csv holds the numbers as they are, the other two what a reader wants to see.
    """
    cells, note = _cells(frame), _note(frame)
    caption = f"{caption} {note}".strip()
    texts = {
        ".md": f"{caption}\n\n{_markdown(cells, 'pipe')}\n",
        ".csv": frame.to_csv(index=False, lineterminator="\n"),
        ".tex": _latex(cells, stem.name, caption),
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, text in texts.items():
        path = stem.with_name(stem.name + suffix)
        path.write_text(text, encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


def print_table(frame: pd.DataFrame) -> None:
    """Print `frame` for a terminal."""
    print(_markdown(_cells(frame), "simple"))
    if note := _note(frame):
        print(note)


def sweep_table(sweep_dir: Path, name: str, tables_dir: Path) -> pd.DataFrame:
    """Read every job's result.json below a sweep folder; print and write its two tables.

    They are the comparison by `name`, printed last, and the energy by `name`_energy.

    Rows are in the order of the job numbers that begin the folders' names, repeated ones left
    out. Raises InputError where no job has left a result.
    """
    results = distinct(sweep_results(sweep_dir).values())
    energy = energy_frame(results)
    write(energy, tables_dir / f"{name}_energy", ENERGY_CAPTION)
    print_table(energy)
    print()
    frame = result_frame(results)
    told = "; ".join(text for column, text in CAPTIONS.items() if column in frame)
    write(frame, tables_dir / name, f"{told}.")
    print_table(frame)
    return frame


def _cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the main columns as the text a reader sees."""
    shown = [name for name in frame.columns if not name.endswith(("_stderr", "_n"))]
    return pd.DataFrame({name: _column(frame, name) for name in shown}, columns=shown)


def _column(frame: pd.DataFrame, name: str) -> list[str]:
    if f"{name}_stderr" in frame:
        pairs = zip(frame[name], frame[f"{name}_stderr"], strict=True)
        return [_with_error(value, error) for value, error in pairs]
    formatter = _formatter(name)
    return [UNDEFINED if pd.isna(value) else formatter(value) for value in frame[name]]


def _formatter(column: str) -> Callable[[Any], str]:
    if column.startswith("ppl_"):
        return _perplexity
    if column.startswith(("relative_", "nmse_")):
        return lambda value: _scientific(value, 1)
    by_name: dict[str, Callable[[Any], str]] = {
        "nmse": lambda value: _scientific(value, 1),
        "spikes_per_value": "{:.3f}".format,
        "macs_G": lambda value: _significant(value, 4),
        "acs_G": lambda value: _significant(value, 4),
        "energy_J": lambda value: _significant(value, 3),
        "saving": lambda value: f"{100 * value:.1f} %",
        "fitting_s": "{:.1f}".format,
        "conversion_s": "{:.1f}".format,
        "bits": "{:.3g}".format,
        "slope": "{:g}".format,
        "rho": "{:.4f}".format,
        "C": lambda value: _scientific(value, 2),
        "C_relative": "{:.4f}".format,
        "last_relative": "{:.4f}".format,
        "R2": "{:.3f}".format,
    }
    fraction = column.startswith(("acc_", "share_"))
    return by_name.get(column, "{:.3f}".format if fraction else str)


def _perplexity(value: float) -> str:
    if value > DIVERGED:
        return _scientific(value, 1)
    return f"{value:.3f}" if value < 100 else f"{value:.2f}"


def _with_error(value: float, error: float) -> str:
    """Give a value with as many decimals as its standard error bears: 0.46 ± 0.05."""
    if pd.isna(value):
        return UNDEFINED
    if pd.isna(error):
        return f"{value:.3f}"
    decimals = 2 if error >= 0.0095 else 3
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _scientific(value: float, decimals: int) -> str:
    return re.sub(r"e([+-])0*(\d+)", _exponent, f"{value:.{decimals}e}")


def _exponent(found: re.Match[str]) -> str:
    sign = found[1].replace("+", "")
    return f"e{sign}{found[2]}"


def _significant(value: float, digits: int) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    text = np.format_float_positional(
        value, precision=digits, unique=False, fractional=False, trim="k"
    )
    return text.rstrip(".")


def _note(frame: pd.DataFrame) -> str:
    """Say over how many items each accuracy is, which no cell has room for."""
    items = {}
    for name in frame.columns:
        if name.startswith("acc_") and name.endswith("_n"):
            counts = sorted(frame[name].dropna().unique())
            items[name[len("acc_") : -len("_n")]] = "/".join(map(str, counts))
    if not any(items.values()):
        return ""
    tasks = ", ".join(f"{task} {count}" for task, count in items.items() if count)
    return f"Accuracy ± standard error; items: {tasks}."


def _markdown(cells: pd.DataFrame, style: str) -> str:
    # tabulate would read the text as numbers again and undo the format of each column
    align = ["left" if name in LEFT else "right" for name in cells.columns]
    if style == "pipe":
        cells = cells.map(lambda text: text.replace("|", r"\|"))
    return cells.to_markdown(index=False, tablefmt=style, disable_numparse=True, colalign=align)


def _latex(cells: pd.DataFrame, label: str, caption: str) -> str:
    """Typeset the cells as a booktabs table that fits the width of the line."""
    columns = "".join("l" if name in LEFT else "r" for name in cells.columns)
    table = (
        cells.map(_latex_text)
        .rename(columns=_latex_text)
        .style.hide(axis="index")
        .to_latex(hrules=True, column_format=columns)
    )
    return (
        "% needs \\usepackage{booktabs,graphicx}\n"
        "\\begin{table}\n\\centering\n"
        f"\\caption{{{_latex_text(caption)}}}\n\\label{{tab:{label}}}\n"
        f"\\resizebox{{\\linewidth}}{{!}}{{%\n{table.rstrip()}\n}}\n"
        "\\end{table}\n"
    )


def _latex_text(text: str) -> str:
    escaped = text.translate(_LATEX)
    if text == "inf":
        return r"$\infty$"
    return re.sub(r"^(-?\d(?:\.\d+)?)e(-?\d+)$", r"$\1\\times10^{\2}$", escaped)
