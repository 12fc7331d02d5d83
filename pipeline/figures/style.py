"""What all figures have in common: their size, their type, the looks of roles, and how they are saved."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backend_bases import get_registered_canvas_class
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

Array = NDArray[np.float64]
WIDTH = 5.5  # inches, the text width of a page of ICLR and NeurIPS
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,  # TrueType: journals refuse matplotlib's default, type 3
}
BARS: dict[str, Any] = {"elinewidth": 0.8}  # of errors
# Paul Tol's "muted" scheme, its pale grey darkened, and black: safe for colour-blind readers
ROLES = {
    "attn.in": ("#332288", "o"),
    "attn.q": ("#88CCEE", "s"),
    "attn.k": ("#44AA99", "^"),
    "attn.v": ("#117733", "v"),
    "attn.probs": ("#999933", "D"),
    "attn.out": ("#DDCC77", "P"),
    "mlp.in": ("#CC6677", "X"),
    "mlp.act": ("#882255", "<"),
    "mlp.up": ("#AA4499", ">"),
    "mlp.down": ("#777777", "*"),
    "head.in": ("#000000", "h"),
}


def panels(
    count: int, columns: int, inches: float, shared: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, each row of them so many inches high."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, 0.5 + rows * inches))
    grid: Any = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared)
    every = list(grid.ravel())
    for axes in every[count:]:
        axes.remove()
    return figure, every[:count]


def entry(label: str, **look: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, **look)


def legend_beside(axes: Axes, handles: Sequence[Line2D]) -> None:
    """A legend on the right of a panel."""
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5))


def legend_above(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A legend of what all panels share."""
    figure.legend(handles=handles, loc="outside upper center", ncols=3)


def noted(label: str, note: str, width: int = 95) -> str:
    """An axis' label with a note below it, broken where the page ends."""
    return "\n".join([label, *textwrap.wrap(note, width)])


@rc_context(STYLE)  # the type of the fonts is decided when a file is written
def save(figure: Figure, stem: Path, suffixes: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Write stem.png and stem.pdf with embedded fonts; the same figure gives the same bytes."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # a line for each table of each font
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # all files have the layout that has just been computed
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in suffixes]
    for path in paths:  # each is drawn once, where `savefig` would draw it for its layout too
        kind = path.suffix[1:]
        canvas = get_registered_canvas_class(kind)(figure)
        metadata = {"CreationDate": None} if kind == "pdf" else None
        getattr(canvas, f"print_{kind}")(path, metadata=metadata)
    return paths
