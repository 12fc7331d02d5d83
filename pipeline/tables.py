"""Turn the results of runs into one table: on the terminal, and as Markdown, csv and LaTeX."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.errors import InputError

UNDEFINED = "–"
DIVERGED = 1e4  # a perplexity above this says only that the model is broken
COUNTS = ("grains", "timesteps")
TEXT = ("model", "coding")
LEFT = (*TEXT, "run", "convention", "phase")  # columns of words
CAPTION = (
    "nmse: geometric mean over the sites, on held-out activations; spikes_per_value: weighted by "
    "fan-out; macs_G to saving: the causal convention, saving against the dense model; "
    "conversion_s: capture to patching, when they were computed."
)
ENERGY_CAPTION = (
    "Energy by convention (paper: full attention square, one spiking operand a product; causal: "
    "unmasked positions, both operands, gates and decode scaling) and phase (prefill of a window; "
    "one decoded token at its end); saving against the dense model in the same convention."
)
# Where a result keeps the totals of a convention and phase; the empty name is its top level.
ENERGIES = {
    ("paper", "prefill"): "paper",
    ("causal", "prefill"): "",
    ("paper", "decode"): "paper_decode",
    ("causal", "decode"): "decode",
}
COSTS = ("macs_G", "acs_G", "energy_J", "saving")
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


def result_frame(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Collect results, one row each, in the column order of every table.

    Perplexities and accuracies come in the order they are first met; the standard errors and
    item counts of accuracies stand last. What a result leaves out or gives as null is missing.
    """
    rows = list(results)
    names = list(dict.fromkeys(name for row in rows for name in row))
    accuracy = [name for name in names if name.startswith("acc_")]
    extra = [name for name in accuracy if name.endswith(("_stderr", "_n"))]
    columns = [
        *TEXT,
        *COUNTS,
        *(name for name in names if name.startswith("ppl_")),
        *(name for name in accuracy if name not in extra),
        *("nmse", "spikes_per_value", "macs_G", "acs_G", "energy_J", "saving", "conversion_s"),
        *extra,
    ]
    frame = pd.DataFrame([{name: row.get(name) for name in columns} for row in rows], None, columns)
    types = {name: _dtype(name) for name in columns if name not in TEXT}
    return frame.astype(types)


def energy_frame(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Collect the energy of every result in both conventions and phases, one row each."""
    rows = []
    for result in results:
        for (convention, phase), place in ENERGIES.items():
            totals = result[place] if place else result
            names = {"run": result["label"], "convention": convention, "phase": phase}
            rows.append(names | {name: totals[name] for name in COSTS})
    return pd.DataFrame(rows).astype(dict.fromkeys(COSTS, "float64"))


def _dtype(column: str) -> str:
    return "Int64" if column in COUNTS or column.endswith("_n") else "float64"


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

    Rows are in the order of the job numbers that begin the folders' names. Raises InputError
    where no job has left a result.
    """
    paths = sorted(sweep_dir.glob("*/result.json"), key=_job_number)
    if not paths:
        raise InputError(f"no job below {sweep_dir} has left a result.json: see the jobs' logs")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    energy = energy_frame(results)
    write(energy, tables_dir / f"{name}_energy", ENERGY_CAPTION)
    print_table(energy)
    print()
    frame = result_frame(results)
    write(frame, tables_dir / name, CAPTION)
    print_table(frame)
    return frame


def _job_number(path: Path) -> tuple[float, str]:
    number = re.match(r"\d+", path.parent.name)
    return (int(number[0]) if number else math.inf, path.parent.name)


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
    by_name: dict[str, Callable[[Any], str]] = {
        "nmse": lambda value: _scientific(value, 1),
        "spikes_per_value": "{:.3f}".format,
        "macs_G": lambda value: _significant(value, 4),
        "acs_G": lambda value: _significant(value, 4),
        "energy_J": lambda value: _significant(value, 3),
        "saving": lambda value: f"{100 * value:.1f} %",
        "conversion_s": "{:.1f}".format,
    }
    return by_name.get(column, "{:.3f}".format if column.startswith("acc_") else str)


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
