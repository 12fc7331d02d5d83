"""How the numbers of a table read, column by column."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from uncertainties import ufloat

UNDEFINED = "–"
DIVERGED = 1e4  # a perplexity above this says only that the model is broken
BEYOND = ">1e4"
MOST = 9999  # percent of excess: above it only that the model is broken


@dataclass(frozen=True)
class Column:
    """One column: `name` in the frame and the csv, `head` with its unit, how a value reads.

    `best` says which end of it is bold; where the value has an error, `ratio` is the column of its ratio
    to the dense model, whose interval must be clear of the next best's. `group` stands over columns that
    have it in common, `beside` names columns, its error say, that `show` takes too, as NaN where the
    frame lacks one; `words` are set left. Where a terminal has no room for all, columns of a higher
    `spare` are left out first.
    """

    name: str
    head: str
    show: Callable[..., str] = str
    best: Literal["min", "max"] | None = None
    ratio: str = ""
    group: str = ""
    beside: tuple[str, ...] = ()
    words: bool = False
    spare: int = 0

    def texts(self, frame: pd.DataFrame) -> list[str]:
        """The cells of this column as a reader sees them."""
        if self.name not in frame:
            return [UNDEFINED] * len(frame)
        unknown = pd.Series(math.nan, frame.index)
        rows = zip(*(frame.get(name, unknown) for name in (self.name, *self.beside)), strict=True)
        return [UNDEFINED if pd.isna(v) else self.show(v, *more) for v, *more in rows]


def measured(value: float, error: float, scale: float = 1) -> str:
    """A value with its error, as many digits of both as the error bears: 23.79 ± 0.05.

    The rounding is that of the Particle Data Group (Review of Particle Physics, section 5.3).
    """
    if error == 0:
        return f"{scale * value:g} ± 0"
    return f"{ufloat(scale * value, scale * error):f}".replace("+/-", " ± ")


def perplexity(value: float, error: float = math.nan) -> str:
    """With its error; without one three decimals below 100, two above; a diverged one by its magnitude."""
    if value > DIVERGED:
        return scientific(value, 1)
    if math.isfinite(error):
        return measured(value, error)
    return f"{value:.3f}" if value < 100 else f"{value:.2f}"


def bounded_perplexity(value: float, error: float = math.nan) -> str:
    """With its error, without one two decimals; of a diverged one only that it is."""
    if value > DIVERGED:
        return BEYOND
    return measured(value, error) if math.isfinite(error) else f"{value:.2f}"


def excess(ratio: float, low: float = math.nan, high: float = math.nan) -> str:
    """How much a ratio is above 1, in percent, with its interval: +3.8 % [+3.1, +4.5].

    The interval's half width decides the decimals, two of its digits at most.
    """
    percent = 100 * (ratio - 1)
    if not percent <= MOST:
        return f">{MOST} %"
    half = 50 * (high - low)
    if not math.isfinite(half):
        decimals = 0 if abs(percent) >= 9.95 else 1
        return f"{_signed(percent, decimals)} %"
    decimals = 0 if half >= 9.5 else 1 if half >= 0.095 else 2 if half >= 0.0095 else 3
    ends = ", ".join(_signed(100 * (end - 1), decimals) for end in (low, high))
    return f"{_signed(percent, decimals)} % [{ends}]"


def _signed(value: float, decimals: int) -> str:
    """With its sign; what rounds to nothing has none."""
    text = f"{value:+.{decimals}f}"
    return text if float(text) else text[1:]


def percent(value: float, error: float = math.nan) -> str:
    """A fraction in percent, with its standard error: 46 ± 5."""
    return measured(value, error, 100) if math.isfinite(error) else f"{100 * value:.2f}"


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
