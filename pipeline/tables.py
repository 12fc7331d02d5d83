"""Turn the results of a sweep into its tables: on the terminal, and as Markdown, csv and LaTeX."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import sheet
from pipeline.columns import Column, perplexity, scientific, significant, with_error
from pipeline.rows import TEXT, distinct, energy_frame, result_frame, sweep_results

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
SHOWN: dict[str, Callable[[Any], str]] = {
    "nmse": lambda value: scientific(value, 1),
    "spikes_per_value": "{:.3f}".format,
    "macs_G": lambda value: significant(value, 4),
    "acs_G": lambda value: significant(value, 4),
    "energy_J": lambda value: significant(value, 3),
    "saving": lambda value: f"{100 * value:.1f} %",
    "fitting_s": "{:.1f}".format,
    "conversion_s": "{:.1f}".format,
    "bits": "{:.3g}".format,
    "slope": "{:g}".format,
    "rho": "{:.4f}".format,
    "C": lambda value: scientific(value, 2),
    "C_relative": "{:.4f}".format,
    "last_relative": "{:.4f}".format,
    "R2": "{:.3f}".format,
}


def write(frame: pd.DataFrame, stem: Path, caption: str) -> list[Path]:
    """Write `frame` as stem.md, stem.csv and stem.tex; the same frame gives the same bytes."""
    return sheet.write(_sheet(frame, caption), stem)


def print_table(frame: pd.DataFrame) -> None:
    """Print `frame` for a terminal."""
    shown = _sheet(frame, "")
    print(sheet.terminal(shown))
    if shown.caption:
        print(shown.caption)


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


def _sheet(frame: pd.DataFrame, caption: str) -> sheet.Sheet:
    """The main columns under the names that the csv has."""
    shown = [name for name in frame.columns if not name.endswith(("_stderr", "_n"))]
    columns = [_column(name, frame) for name in shown]
    return sheet.Sheet(frame, columns, f"{caption} {_note(frame)}".strip())


def _column(name: str, frame: pd.DataFrame) -> Column:
    error = f"{name}_stderr"
    if error in frame:
        return Column(name, name, with_error, error=error)
    if name.startswith("ppl_"):
        return Column(name, name, perplexity)
    if name.startswith(("relative_", "nmse_")):
        return Column(name, name, SHOWN["nmse"])
    fraction = name.startswith(("acc_", "share_"))
    show = SHOWN.get(name, "{:.3f}".format if fraction else str)
    return Column(name, name, show, words=name in LEFT)


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
