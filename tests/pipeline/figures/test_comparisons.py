"""Comparing figures: what is drawn equals the data, no two series look alike, nothing is cut off."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from pipeline.figures import comparisons, levels, style
from stages.codings.gated import Gated
from stages.codings.las import Las

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB: what the three kinds of dichromats see.
DICHROMATS = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def png(figure) -> np.ndarray:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return imread(BytesIO(buffer.getvalue()))


def drawn(axes) -> dict[str, list]:
    """The points of every coloured line by its colour."""
    lines = [line for line in axes.get_lines() if line.get_color() in dict(comparisons.LOOKS)]
    return {line.get_color(): np.round(line.get_xydata(), 9).tolist() for line in lines}


def legends(figure) -> list[str]:
    shown = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    return [text.get_text() for legend in shown for text in legend.get_texts()]


def result(name: str, steps: int | None, ppl: float, energy: float | None, **more) -> dict:
    label = name if steps is None else f"{name} T={steps} n={more.get('grains', 1)}"
    numbers = {"timesteps": steps, "grains": 1, "ppl_a": ppl, "energy_J": energy}
    return {"model": "tiny", "coding": name, "row": name, "label": label} | numbers | more


RESULTS = [
    result("dense", None, 20, 1, grains=None),
    result("las", 6, 800, 0.3),
    result("las", 4, 3e6, 0.2),
    result("las", 8, 30, 0.5),
    result("ttfs", 128, 40, 0.6),
    result("bound", 6, 21, None),
    result("bound", 8, 20.5, None),
]


COLOURS = [colour for colour, _ in comparisons.LOOKS]


def test_perplexity_by_steps_is_the_excess_over_dense_in_percent_in_order():
    figure = comparisons.perplexity_by(comparisons.comparison_frame(RESULTS), "timesteps")
    (axes,) = figure.axes
    las, ttfs, bound = (drawn(axes)[colour] for colour in COLOURS[:3])
    assert las == [[6, 3900], [8, 50]] and bound == [[6, 5], [8, 2.5]]
    assert [y for _, y in ttfs] == [100, 100]  # one T in all: level
    dense = [line for line in axes.get_lines() if line.get_color() == "black"]
    assert [line.get_ydata()[0] for line in dense] == [0]
    assert axes.get_title() == "dense 20" and axes.get_yscale() == "symlog"
    assert "las 1" in figure._supxlabel.get_text() and "ttfs" not in figure._supxlabel.get_text()
    assert legends(figure) == ["las", "ttfs (T=128)", "bound"]
    assert png(figure).shape[1] == style.WIDTH * figure.dpi


def test_without_a_dense_run_perplexity_itself_is_drawn():
    frame = comparisons.comparison_frame(RESULTS[1:])
    figure = comparisons.perplexity_by(frame, "timesteps")
    assert drawn(figure.axes[0])[COLOURS[0]] == [[6, 800], [8, 30]]
    assert figure.axes[0].get_yscale() == "log"
    assert figure._supylabel.get_text() == "perplexity"


def many(count: int, panels: tuple[str, ...] = ("none",)) -> list[dict]:
    """A dense model and `count` codings of several T under some transforms."""
    draw = np.random.default_rng(0)
    found = []
    for transform in panels:
        found.append(result("dense", None, 20, 1, grains=None, transform=transform))
        for i in range(count):
            for steps in (4, 6, 8):
                ppl, energy = 20 + 10 ** draw.uniform(-2, 2), draw.uniform(0.2, 0.8)
                found.append(result(f"coding_{i}", steps, ppl, energy, transform=transform))
    return found


@pytest.mark.parametrize("draw", ["timesteps", "energy"])
def test_twenty_three_series_can_be_told_apart_and_fit_on_a_page(draw):
    """Each is coloured in one row of panels, beside its name, where no other has its look."""
    frame = comparisons.comparison_frame(many(22, ("none", "rotate")))
    by_steps = draw == "timesteps"
    figure = (
        comparisons.perplexity_by(frame, draw)
        if by_steps
        else comparisons.perplexity_by_energy(frame)
    )
    png(figure)
    assert figure.get_figheight() < 9  # inches, the height of a page of ICLR and NeurIPS
    assert legends(figure) == [f"coding_{i}" for i in range(22)]
    points = frame[~frame["dense"]].set_index(["panel", "series"])
    for place, axes in enumerate(figure.axes):
        panel = ("transform none", "transform rotate")[place % 2]
        legend = figure.axes[place // 2 * 2 + 1].get_legend()
        looks = [(line.get_color(), line.get_marker()) for line in legend.get_lines()]
        assert len({c for c, _ in looks}) == len({m for _, m in looks}) == len(looks) <= 6
        for (colour, _), text in zip(looks, legend.get_texts(), strict=True):
            own = points.loc[[(panel, text.get_text())]]
            x = own["timesteps"] if by_steps else own["energy_J"]
            height = 100 * (own["ppl"] / 20 - 1)
            expected = sorted(zip(x, height, strict=True))
            np.testing.assert_allclose(drawn(axes)[colour], expected, rtol=1e-6)
        box = legend.get_window_extent()
        assert box.x0 >= figure.axes[1].get_window_extent().x1 - 1 and box.x1 <= figure.bbox.x1
    words = [figure._supxlabel, *figure.legends]
    extents = [word.get_window_extent() for word in words]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in extents)


def test_a_series_looks_the_same_in_every_figure():
    frame = comparisons.comparison_frame(many(14))
    frame.loc[frame["series"] == "coding_3", "energy_J"] = np.nan  # a bound costs nothing

    def looks(figure) -> dict:
        shown = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        pairs = (p for s in shown for p in zip(s.get_texts(), s.get_lines(), strict=True))
        return {text.get_text(): (line.get_color(), line.get_marker()) for text, line in pairs}

    by_steps = looks(comparisons.perplexity_by(frame, "timesteps"))
    by_energy = looks(comparisons.perplexity_by_energy(frame))
    assert by_steps.keys() - by_energy.keys() == {"coding_3"}
    assert by_energy.items() <= by_steps.items()


def linear(colour) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("kind", DICHROMATS)
def test_colours_differ_for_colour_blind_readers(kind):
    """Euclidean distance in CIELAB of what they see; 10 is plain side by side."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    white = to_xyz.sum(1)

    def lab(colour: str) -> np.ndarray:
        seen = np.clip(np.array(DICHROMATS[kind]) @ linear(colour), 0, 1)
        ratio = to_xyz @ seen / white
        f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    seen = [lab(colour) for colour in [*COLOURS, "black", comparisons.OTHER["color"]]]
    apart = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(apart) > 10


def test_more_panels_than_a_row_has_room_for_take_another_row():
    results = [r | {"model": m} for m in "abcde" for r in many(2)]
    figure = comparisons.perplexity_by(comparisons.comparison_frame(results), "timesteps")
    shown = [axes.get_title() for axes in figure.axes]
    assert shown == [f"{model}, dense 20" for model in "abcde"]
    png(figure)


def test_a_series_is_told_by_its_grains_only_where_they_vary():
    names = comparisons.series_names(
        [
            *(result("multigrain", 6, 1, 1, grains=n) for n in (2, 3)),
            *(result("free", n, 1, 1, grains=n) for n in (4, 6)),
            result("gated2", 6, 1, 1, grains=2),
        ]
    )
    assert names == ["multigrain n=2", "multigrain n=3", "free", "free", "gated2"]


def test_a_series_is_told_by_the_settings_that_a_row_has_several_of():
    runs = [["coding.v0=zero"], ["coding.v0=half_step"]]
    results = [
        result("las", 6, 1, 1) | {"run": {"overrides": [*run, "fitting.seed=0", "row=las"]}}
        for run in runs
    ]
    assert comparisons.series_names(results) == ["las v0=zero", "las v0=half_step"]
    thirds = [
        result("compander", 6, 1, 1) | {"run": {"overrides": [f"coding.alpha={alpha}"]}}
        for alpha in (0.0, 1 / 3)
    ]
    assert comparisons.series_names(thirds) == ["compander alpha=0.0", "compander alpha=0.333"]


def test_transforms_have_panels_of_their_own():
    turned = [r | {"transform": t} for t in ("none", "rotate") for r in RESULTS]
    figure = comparisons.perplexity_by_energy(comparisons.comparison_frame(turned))
    assert [axes.get_title() for axes in figure.axes] == [
        "transform none, dense 20",
        "transform rotate, dense 20",
    ]


def test_the_pareto_front_is_what_no_point_beats():
    draw = np.random.default_rng(0)
    cost, loss = draw.integers(0, 12, 60).astype(float), draw.integers(0, 12, 60).astype(float)
    expected = []
    for i in range(60):
        beaten = False
        for j in range(60):
            as_good = cost[j] <= cost[i] and loss[j] <= loss[i]
            beaten |= as_good and (cost[j] < cost[i] or loss[j] < loss[i])
        expected.append(not beaten)
    assert comparisons.pareto(cost, loss).tolist() == expected and 0 < sum(expected) < 60


def test_the_energy_figure_marks_the_front_and_leaves_bounds_out():
    figure = comparisons.perplexity_by_energy(comparisons.comparison_frame(RESULTS))
    (axes,) = figure.axes
    (front,) = (line for line in axes.get_lines() if line.get_linewidth() == 3)
    np.testing.assert_allclose(front.get_xydata(), [[0.3, 3900], [0.5, 50], [1, 0]], atol=1e-9)
    assert drawn(axes) == {COLOURS[0]: [[0.3, 3900], [0.5, 50]], COLOURS[1]: [[0.6, 100]]}
    (dense,) = (line for line in axes.get_lines() if line.get_marker() == "*")
    assert dense.get_xydata().tolist() == [[1, 0]]
    assert [text.get_text() for text in axes.texts] == ["6", "8"]
    assert legends(figure) == ["las", "ttfs"]


def test_evenly_spaced_levels_have_the_density_of_their_number():
    x = np.linspace(0.01, 5, 300)
    density = levels.level_density(np.arange(64) / 64 * 4, x)
    inside = x < 4 * 63 / 64
    np.testing.assert_allclose(density[inside], 1 / 4)
    assert np.isnan(density[~inside]).all()


def test_a_companded_code_has_the_density_it_was_made_with():
    count = 4096
    made = -np.log(1 - (np.arange(count) + 0.5) / count)  # quantiles of exp(-x)
    x = np.linspace(0.1, 2, 50)
    np.testing.assert_allclose(levels.level_density(made, x), np.exp(-x), rtol=0.05)


def test_the_levels_of_a_gated_neuron_are_those_some_value_is_given():
    gated, las = Gated("gated", 4, 2), Las("las", 4, "half_step")
    reached = levels.reached(gated, {"scale": torch.tensor([1.0, 8.0])}, 8.0)
    coarse = np.arange(2, 16) / 2  # half a step below 1 is where the finer range ends
    np.testing.assert_allclose(reached, np.concatenate([np.arange(16) / 16, coarse]))
    reached = levels.reached(las, {"scale": torch.tensor([2.0])}, 2.0)
    np.testing.assert_allclose(reached, np.arange(16) / 8)


def test_level_densities_have_a_column_a_site_and_a_curve_a_coding():
    x = np.geomspace(1e-3, 10, 100)
    curves = {f"coding_{i}": np.full(100, 0.1 * (i + 1)) for i in range(7)}
    sites = [levels.SiteLevels(name, x, np.exp(-x), np.exp(-x / 3) / 3, curves) for name in "ab"]
    rows = comparisons.looks(comparisons.comparison_frame(many(8)))  # one of them has no levels
    figure = levels.level_densities(sites, rows, "T = 6")
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "", ""]
    assert [len(axes.get_lines()) - 2 for axes in figure.axes] == [4, 4, 3, 3]
    assert legends(figure) == list(curves)
    for row, axes in zip((0, 0, 4, 4), figure.axes, strict=True):
        for place, line in enumerate(axes.get_lines()[2:]):
            np.testing.assert_allclose(line.get_ydata(), 0.1 * (row + place + 1))
            assert line.get_color() == COLOURS[place]
    assert png(figure).shape[1] == style.WIDTH * figure.dpi


@pytest.mark.parametrize("decades", [2, 5])
def test_labels_of_magnitudes_keep_apart(decades):
    """Three sites are as many as a page shows side by side; matplotlib draws labels over each other."""
    x = np.geomspace(10.0**-decades, 5, 200)
    curve = {"las": np.ones(200)}
    sites = [levels.SiteLevels(n, x, np.exp(-x), np.exp(-x / 3), curve) for n in "abc"]
    look = comparisons.looks(comparisons.comparison_frame([result("las", 6, 30, 0.3)]))
    figure = levels.level_densities(sites, look, "T = 6")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for axes in figure.axes:
        low, high = sorted(axes.get_xlim())
        ticks = [tick for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [tick.label1.get_window_extent(renderer) for tick in ticks]
        assert len(boxes) >= 2
        assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


def bars(axes) -> list[list]:
    """The ends of every error bar, from the left."""
    collections = [c for c in axes.collections if hasattr(c, "get_segments")]
    return [np.round(s[:, 1], 6).tolist() for c in collections for s in c.get_segments() if len(s)]


def measured(ppl: float, low: float, high: float, se: float, steps: int, **more) -> dict:
    numbers = {"ratio_a": ppl / 20, "ratio_a_low": low, "ratio_a_high": high, "ppl_a_se": se}
    return result("las", steps, ppl, steps / 10) | numbers | {"replicates": 1} | more


def test_bars_are_the_interval_of_the_ratio_and_without_a_dense_run_the_standard_error():
    runs = [measured(22, 1.05, 1.2, 3, 6), measured(21, 1.04, 1.07, 2, 8)]
    frame = comparisons.comparison_frame([RESULTS[0], *runs])
    for figure in (
        comparisons.perplexity_by(frame, "timesteps"),
        comparisons.perplexity_by_energy(frame),
    ):
        assert bars(figure.axes[0]) == [[5, 20], [4, 7]]
        assert figure._supylabel.get_text() == "perplexity over the dense model's, 95 % intervals"
    figure = comparisons.perplexity_by(comparisons.comparison_frame(runs), "timesteps")
    assert bars(figure.axes[0]) == [[19, 25], [19, 23]]
    assert figure._supylabel.get_text() == "perplexity ± standard error"


def test_a_perplexity_far_below_the_dense_one_has_a_number_beside_it():
    runs = [measured(12, 0.5, 0.7, 3, 6), measured(21, 1.04, 1.07, 2, 8)]
    frame = comparisons.comparison_frame([RESULTS[0], *runs])
    (axes,) = comparisons.perplexity_by(frame, "timesteps").axes
    low, high = axes.get_ylim()
    assert {-10, -1, 0, 1} <= {tick for tick in axes.get_yticks() if low <= tick <= high}


def test_the_spread_over_replicates_makes_bars_longer():
    one = measured(22, 1.05, 1.15, 3, 6)
    three = one | {"replicates": 3, "ppl_a_spread": 0.22}
    heights = []
    for run in (one, three):
        frame = comparisons.comparison_frame([RESULTS[0], run, measured(21, 1.0, 1.1, 1, 8)])
        heights.append(bars(comparisons.perplexity_by(frame, "timesteps").axes[0])[0])
    assert heights[0] == [5, 15]
    half = np.hypot(5, 100 * 1.1 * 0.01 * 4.302653 / 3**0.5)  # Student's t, 2 degrees of freedom
    np.testing.assert_allclose(heights[1], [10 - half, 10 + half], rtol=1e-5)
