"""Errors of measured columns: how they are written, what a mean has, and when a value is the best."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from pipeline.results import columns, uncertainty
from pipeline.results.columns import Column
from pipeline.tables.sheet import Sheet

NAN = float("nan")


def test_the_error_decides_the_digits():
    for value, error, text in (
        *((23.7912, 0.0497, "23.79 ± 0.05"), (23.6069, 0.94, "23.6 ± 0.9")),
        *((427.84, 151.2, "428 ± 151"), (22.74162, 0.00042, "22.7416 ± 0.0004")),
        *((9012.3, 2310, "9012 ± 2310"), (19.5, 0, "19.5 ± 0"), (23.7912, NAN, "23.791")),
    ):
        assert columns.perplexity(value, error) == text
    assert columns.perplexity(4.51e7, 1e6) == "4.5e7" and columns.bounded_perplexity(2e4) == ">1e4"
    assert columns.percent(0.4567, 0.0498) == "46 ± 5"
    assert columns.percent(0.45678, 0.0041) == "45.7 ± 0.4"
    assert columns.percent(1.0, 0.0) == "100 ± 0" and columns.percent(0.5) == "50.00"


def test_an_excess_has_the_digits_of_its_interval():
    for numbers, text in (
        ((1.0381, 1.0312, 1.0452), "+3.8 % [+3.1, +4.5]"),
        ((1.00213, 1.00171, 1.00255), "+0.21 % [+0.17, +0.26]"),
        ((0.99999, 0.996, 1.004), "0.0 % [-0.4, +0.4]"),
        ((1.25, 1.1, 1.4), "+25 % [+10, +40]"),
        *(((1.0381, NAN, NAN), "+3.8 %"), ((38.76, NAN, NAN), "+3776 %")),
        *(((1e6, NAN, NAN), ">9999 %"), ((math.inf, NAN, NAN), ">9999 %")),
    ):
        assert columns.excess(*numbers) == text


def rows(**changed: list[float]) -> pd.DataFrame:
    frame = {
        "ppl_a": [22.0, 21.0, 30.0],
        "ppl_a_se": [0.3, 0.4, 0.5],
        "ratio_a": [1.1, 1.05, 1.5],
        "ratio_a_low": [1.09, 1.04, 1.4],
        "ratio_a_high": [1.11, 1.06, 1.6],
        "replicates": [1, 1, 1],
    }
    return pd.DataFrame(frame | changed)


def bold(frame: pd.DataFrame) -> list[bool]:
    column = Column("ppl_a", "ppl", columns.perplexity, "min", "ratio_a", beside=("ppl_a_se",))
    return [cell for (cell,) in Sheet(frame, [column], "", [0] * 3, [True] * 3).bold()]


def test_the_best_is_bold_only_where_its_interval_is_clear_of_the_next():
    assert bold(rows()) == [False, True, False]
    assert bold(rows(ratio_a_high=[1.11, 1.095, 1.6])) == [False] * 3
    assert (
        bold(rows(ratio_a_high=[1.11, NAN, 1.6])) == [False] * 3
    )  # what is not known is not clear


def test_a_spread_over_replicates_hides_a_difference():
    spread = {"replicates": [3, 3, 3], "ppl_a_spread": [0.01, 0.01, 0.01]}
    assert bold(rows(**spread)) == [False, True, False]
    assert bold(rows(**spread | {"ppl_a_spread": [0.01, 0.8, 0.01]})) == [False] * 3


def test_means_over_texts_have_the_errors_of_independent_ones():
    frame = rows(ppl_b=[10.0, 11.0, 12.0], ppl_b_se=[0.4, 0.3, 0.5], ratio_b=[1.25, 1.1, 1.2])
    frame = frame.assign(ratio_b_low=[1.15, 1.0, 1.1], ratio_b_high=[1.35, 1.2, 1.3])
    first = uncertainty.with_means(frame).iloc[0]
    assert first["ppl_mean"] == 16 and first["ppl_mean_se"] == pytest.approx(0.25)
    assert first["ratio_ppl_mean"] == pytest.approx(16 / 14)  # the dense model has 20 and 8
    half = math.hypot(0.01 * 20, 0.1 * 8) / 2 / 14
    assert first["ratio_ppl_mean_low"] == pytest.approx(16 / 14 - half)
    assert first["ratio_ppl_mean_high"] == pytest.approx(16 / 14 + half)
    assert pd.isna(first["acc_mean"]) and pd.isna(first["ratio_acc_mean"])
    unknown = uncertainty.with_means(frame.assign(ppl_b_se=NAN)).iloc[0]
    assert pd.isna(unknown["ppl_mean_se"]) and unknown["ppl_mean"] == 16
