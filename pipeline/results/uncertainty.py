"""The errors of a measured column: where they stand in a frame, and the interval that comparisons use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

# Behind the name of a perplexity, accuracy or ratio: over text, over replicates, 95 % interval, items.
SUFFIXES = ("_se", "_spread", "_low", "_high", "_n")
PERPLEXITY, ACCURACY, RATIO, CHANGED = "ppl_", "acc_", "ratio_", "changed_"
CONFIDENCE = 0.95


def measures(names: Iterable[object]) -> tuple[list[str], list[str]]:
    """The perplexities and the accuracies among the names of columns, without their errors."""
    texts = [str(name) for name in names if not str(name).endswith(SUFFIXES)]
    corpora = [name for name in texts if name.startswith(PERPLEXITY)]
    return corpora, [name for name in texts if name.startswith(ACCURACY)]


def ratio(measure: str) -> str:
    """The column of a measured value's ratio to the dense model's."""
    return RATIO + measure.partition("_")[2]


def interval(frame: pd.DataFrame, measure: str, ratio: str) -> tuple[pd.Series, pd.Series]:
    """The 95 % interval of a ratio to the dense model, over text and over replicates, one a row.

    The half widths of both are added in quadrature: that over text is measured, that over replicates is
    Student's t times the standard error of their mean. Unknown where the one over text is.
    """
    none = pd.Series(np.nan, frame.index)
    low, high = (frame.get(f"{ratio}_{end}", none) for end in ("low", "high"))
    centre, spread = frame.get(ratio, none), frame.get(f"{measure}_spread", none)
    count = pd.to_numeric(frame.get("replicates", pd.Series(1, frame.index)))
    several = count.where(count > 1)
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, several - 1) / several**0.5
    half = (centre * spread / frame[measure] * quantile).fillna(0)
    below, above = np.hypot(centre - low, half), np.hypot(high - centre, half)
    return centre - below, centre + above


def with_means(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with arithmetic means over its corpora and its tasks, as the paper takes them, named
    `ppl_mean` and `acc_mean`, and their errors and ratios to the dense model, `ratio_ppl_mean` and
    `ratio_acc_mean`.

    Texts are independent, so errors and half widths are added in quadrature.
    """
    corpora, tasks = measures(frame)
    return frame.assign(**_mean(frame, corpora, "ppl_mean"), **_mean(frame, tasks, "acc_mean"))


def _mean(frame: pd.DataFrame, names: Sequence[str], mean: str) -> dict[str, pd.Series]:
    """The columns of a mean over measured ones; undefined where one of them is."""
    none = pd.Series(np.nan, frame.index)
    values = pd.DataFrame({name: frame[name] for name in names}, frame.index)
    made = {mean: values.mean(axis=1, skipna=False) if names else none}
    for suffix in ("_se", "_spread"):
        errors = pd.DataFrame({n: frame.get(n + suffix, none) for n in names}, frame.index)
        made[mean + suffix] = (errors**2).sum(axis=1, skipna=False) ** 0.5 / max(len(names), 1)
    ratios = {name: frame.get(ratio(name), none) for name in names}
    dense = pd.DataFrame({name: frame[name] / ratios[name] for name in names}, frame.index)
    base = dense.mean(axis=1, skipna=False) if names else none
    of_mean = f"{RATIO}{mean}"
    made[of_mean] = made[mean] / base
    for end, sign in (("low", -1), ("high", 1)):
        bounds = pd.DataFrame({n: frame.get(f"{ratio(n)}_{end}", none) for n in names}, frame.index)
        widths = dense * (bounds - pd.DataFrame(ratios, frame.index)).abs()
        half = (widths**2).sum(axis=1, skipna=False) ** 0.5 / max(len(names), 1) / base
        made[f"{of_mean}_{end}"] = made[of_mean] + sign * half
    return made
