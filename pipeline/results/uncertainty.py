"""The errors of a measured column: where they stand in a frame, and the interval that comparisons use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.results.rows import RATIO, measures
from pipeline.run.measured import BOOTSTRAP


def interval(frame: pd.DataFrame, measure: str, ratio: str) -> tuple[pd.Series, pd.Series]:
    """The 95 % interval of a ratio to the dense model, over text and over replicates, one a row.

    The half widths of both are added in quadrature: that over text is measured, that over replicates is
    Student's t times the standard error of their mean. Unknown where the one over text is.
    """
    from scipy import stats  # takes as long to import as all else of a table

    none = pd.Series(np.nan, frame.index)
    names = (f"{ratio}_low", f"{ratio}_high", ratio, f"{measure}_spread", "replicates")
    low, high, centre, spread, count = (
        pd.to_numeric(frame.get(name, none)).astype("float64") for name in names
    )
    several = count.where(count > 1)
    quantile = stats.t.ppf((1 + BOOTSTRAP.confidence) / 2, several - 1) / several**0.5
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
    perplexities, accuracies = [f"ppl_{n}" for n in corpora], [f"acc_{n}" for n in tasks]
    means = _mean(frame, perplexities, "ppl_mean") | _mean(frame, accuracies, "acc_mean")
    return frame.assign(**means)


def _mean(frame: pd.DataFrame, names: Sequence[str], mean: str) -> dict[str, pd.Series]:
    """The columns of a mean over measured ones; undefined where one of them is."""
    none = pd.Series(np.nan, frame.index)
    values = pd.DataFrame({name: frame[name] for name in names}, frame.index)
    made = {mean: values.mean(axis=1, skipna=False) if names else none}
    for suffix in ("_se", "_spread"):
        errors = pd.DataFrame({n: frame.get(n + suffix, none) for n in names}, frame.index)
        made[mean + suffix] = (errors**2).sum(axis=1, skipna=False) ** 0.5 / max(len(names), 1)
    of_dense = {name: RATIO + name.partition("_")[2] for name in names}
    ratios = {name: frame.get(of_dense[name], none) for name in names}
    dense = pd.DataFrame({name: frame[name] / ratios[name] for name in names}, frame.index)
    base = dense.mean(axis=1, skipna=False) if names else none
    of_mean = f"{RATIO}{mean}"
    made[of_mean] = made[mean] / base
    for end, sign in (("low", -1), ("high", 1)):
        bounds = pd.DataFrame(
            {n: frame.get(f"{of_dense[n]}_{end}", none) for n in names}, frame.index
        )
        widths = dense * (bounds - pd.DataFrame(ratios, frame.index)).abs()
        half = (widths**2).sum(axis=1, skipna=False) ** 0.5 / max(len(names), 1) / base
        made[f"{of_mean}_{end}"] = made[of_mean] + sign * half
    return made
