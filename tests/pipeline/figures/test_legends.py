"""Legends and panels of comparing figures: no entry without a point, no panel without a run."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.figures import comparisons, levels
from tests.pipeline.figures.test_comparisons import RESULTS, legends, many, png, result


def check_legends(figure) -> None:
    """Every entry beside panels has a line or a point in them, and no panel is empty."""
    for axes in figure.axes:
        assert axes.axison and axes.has_data()
        assert any(np.isfinite(line.get_ydata()).any() for line in axes.get_lines())
    for place, axes in enumerate(figure.axes):
        if (legend := axes.get_legend()) is None:
            continue
        before = [a for a in figure.axes[:place] if a.get_legend()]
        row = figure.axes[figure.axes.index(before[-1]) + 1 if before else 0 : place + 1]
        beside = {line.get_color() for each in row for line in each.get_lines()}
        entries = [line.get_color() for line in legend.get_lines()]
        assert entries and set(entries) <= beside
    styles = {line.get_linestyle() for axes in figure.axes for line in axes.get_lines()}
    for text in (text.get_text() for legend in figure.legends for text in legend.get_texts()):
        assert text != "dense" or ":" in styles


BROKEN = result("broken", 6, 2e7, 0.1)


@pytest.mark.parametrize("draw", ["timesteps", "energy"])
def test_a_series_that_diverged_is_in_the_note_and_not_in_the_legend(draw):
    more = [BROKEN, BROKEN | {"timesteps": 8, "row": "broken"}]
    frame = comparisons.comparison_frame([*RESULTS, *more])
    figure = (
        comparisons.perplexity_by(frame, draw)
        if draw == "timesteps"
        else comparisons.perplexity_by_energy(frame)
    )
    check_legends(figure)
    assert not any("broken" in text for text in legends(figure))
    label, *note = figure._supxlabel.get_text().split("\n")
    assert "broken 2" in " ".join(note) and "broken" not in label


def test_a_panel_whose_runs_all_diverged_is_left_out():
    turned = [r | {"transform": "rotate", "ppl_a": 1e9} for r in RESULTS if r["coding"] != "dense"]
    dense = [RESULTS[0] | {"transform": t} for t in ("none", "rotate")]
    results = [*dense, *(r | {"transform": "none"} for r in RESULTS[1:]), *turned]
    figure = comparisons.perplexity_by(comparisons.comparison_frame(results), "timesteps")
    check_legends(figure)
    assert [axes.get_title() for axes in figure.axes] == ["transform none, dense 20"]


def test_a_panel_has_series_of_its_row_or_is_left_out():
    """Twelve codings of which the last six ran on one of two models."""
    results = [r | {"model": m} for m in "ab" for r in many(12 if m == "a" else 6)]
    figure = comparisons.perplexity_by(comparisons.comparison_frame(results), "timesteps")
    check_legends(figure)
    assert len(figure.axes) == 3
    png(figure)
    numbered = [any(t.get_visible() for t in a.get_xticklabels()) for a in figure.axes]
    assert numbered == [False, True, True]  # the lowest of each column
    assert legends(figure) == [f"coding_{i}" for i in range(12)]


def test_what_has_nothing_to_compare_is_no_figure():
    frame = comparisons.comparison_frame
    axes = ("timesteps", "energy_J")
    assert [comparisons.drawable(frame(RESULTS), axis) for axis in axes] == [True, True]
    alone = [RESULTS[0], RESULTS[1], RESULTS[4]]  # no coding at a second T
    assert [comparisons.drawable(frame(alone), axis) for axis in axes] == [False, True]
    lost = [RESULTS[0], *(r | {"ppl_a": 1e9} for r in RESULTS[1:])]
    assert [comparisons.drawable(frame(lost), axis) for axis in axes] == [False, False]


def test_a_front_of_one_run_is_no_line_and_has_no_entry():
    best = result("best", 6, 19, 0.1)
    for results, shown in ((RESULTS, True), ([*RESULTS, best], False)):
        figure = comparisons.perplexity_by_energy(comparisons.comparison_frame(results))
        entries = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
        assert ("Pareto front of all, with T" in entries) == shown


def test_a_coding_of_one_level_has_no_density_and_no_entry():
    x = np.geomspace(1e-3, 10, 100)
    curves = {"coding_0": np.full(100, 0.1), "coding_1": np.full(100, np.nan)}
    site = levels.SiteLevels("a", x, np.exp(-x), np.exp(-x / 3) / 3, curves)
    rows = comparisons.looks(comparisons.comparison_frame(many(2)))
    assert legends(levels.level_densities([site], rows, "T = 6")) == ["coding_0"]


def test_panels_in_several_lines_are_none_of_them_empty():
    results = [r | {"model": m} for m in "abcde" for r in many(2)]
    figure = comparisons.perplexity_by(comparisons.comparison_frame(results), "timesteps")
    check_legends(figure)
    assert len(figure.axes) == 5
