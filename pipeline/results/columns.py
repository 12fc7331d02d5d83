"""How the numbers of a table read, column by column."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

UNDEFINED = "–"
DIVERGED = 1e4  # a perplexity above this says only that the model is broken
BEYOND = ">1e4"
MOST = 9999  # percent of excess: above it only that the model is broken


@dataclass(frozen=True)
class Column:
    """One column: `name` in the frame and the csv, `head` with its unit, how a value reads.

    `best` says which end of it is bold, `group` stands over columns that have it in common, `beside`
    names columns, its standard errors say, that `show` takes too; `words` are set left. Where a
    terminal has no room for all, columns of a higher `spare` are left out first.
    """

    name: str
    head: str
    show: Callable[..., str] = str
    best: Literal["min", "max"] | None = None
    group: str = ""
    beside: tuple[str, ...] = ()
    words: bool = False
    spare: int = 0

    def texts(self, frame: pd.DataFrame) -> list[str]:
        """The cells of this column as a reader sees them."""
        if self.name not in frame:
            return [UNDEFINED] * len(frame)
        rows = zip(*(frame[name] for name in (self.name, *self.beside)), strict=True)
        return [UNDEFINED if pd.isna(v) else self.show(v, *more) for v, *more in rows]


def perplexity(value: float) -> str:
    """Three decimals below 100, two above; a diverged one by its magnitude."""
    if value > DIVERGED:
        return scientific(value, 1)
    return f"{value:.3f}" if value < 100 else f"{value:.2f}"


def bounded_perplexity(value: float) -> str:
    """Two decimals; of a diverged one only that it is."""
    return BEYOND if value > DIVERGED else f"{value:.2f}"


def excess(value: float) -> str:
    """A fraction by which something is larger, in percent with its sign."""
    percent = 100 * value
    if percent > MOST:
        return f">{MOST} %"
    if abs(percent) >= 9.95:
        return f"{percent:+.0f} %"
    return f"{percent:+.1f} %" if abs(percent) >= 0.05 else "0.0 %"


def percent(value: float, error: float = math.nan) -> str:
    """A fraction in percent, with as many decimals as its standard error bears: 46 ± 5."""
    if pd.isna(error):
        return f"{100 * value:.2f}"
    decimals = 0 if error >= 0.0095 else 1 if error >= 0.00095 else 2
    return f"{100 * value:.{decimals}f} ± {100 * error:.{decimals}f}"


def scientific(value: float, decimals: int) -> str:
    """3.1e-4."""
    return re.sub(r"e([+-])0*(\d+)", _exponent, f"{value:.{decimals}e}")


def _exponent(parts: re.Match[str]) -> str:
    sign = parts[1].replace("+", "")
    return f"e{sign}{parts[2]}"


def significant(value: float, digits: int) -> str:
    """So many digits without an exponent."""
    text = f"{value:#.{digits}g}"
    if "e" in text:
        text = np.format_float_positional(
            value, precision=digits, unique=False, fractional=False, trim="k"
        )
    return text.rstrip(".") if value else "0"


def small(value: float, digits: int) -> str:
    """So many digits, with an exponent below a thousandth."""
    if 0 < abs(value) < 1e-3:
        return scientific(value, digits - 1)
    return significant(value, digits)
