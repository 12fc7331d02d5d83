"""Figures: what is drawn equals the data, every role can be told apart, nothing is cut off."""

import sys
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread

from pipeline import comparisons, convergence, figures, levels
from stages.codings.gated import Gated
from stages.codings.las import Las

LAYERS = 4


@pytest.fixture
def per_site() -> pd.DataFrame:
    rows = []
    for number, role in enumerate(figures.ROLES):
        for layer in [-1] if role == "head.in" else range(LAYERS):
            values = 1000 * (layer + 2)
            spikes = values * (0.5 + 0.1 * number)
            nmse = 10.0 ** (-4 + 0.2 * number - 0.1 * layer)
            rows.append((f"{layer}.{role}", role, layer, values, spikes, nmse, spikes / values))
    names = ["site", "role", "layer", "values", "spikes", "nmse", "spikes_per_value"]
    return pd.DataFrame(rows, columns=names)


def role_density() -> figures.RoleDensity:
    """Give an exponential density on a grid that starts at zero, with a hole in its tail."""
    x = np.concatenate([[0.0], np.geomspace(1e-6, 20, 400)])
    density = np.where((x > 12) & (x < 13), 0, np.exp(-x))
    return figures.RoleDensity(x, density, np.exp(-x / 3) / 3, np.arange(64) / 4)


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def png(figure) -> np.ndarray:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return imread(BytesIO(buffer.getvalue()))


def test_error_by_layer_is_the_data_on_a_log_axis(per_site):
    figure = figures.error_per_layer(per_site)
    assert figure.axes[0].get_yscale() == "log"
    for role, line in lines(figure).items():
        np.testing.assert_allclose(line.get_ydata(), per_site[per_site.role == role].nmse)


def test_spike_rate_by_layer_is_the_data(per_site):
    for role, line in lines(figures.spike_rate_per_layer(per_site)).items():
        expected = per_site[per_site.role == role].spikes_per_value
        np.testing.assert_allclose(line.get_ydata(), expected)


def test_several_sites_of_a_layer_are_one_point():
    experts = pd.DataFrame(
        {
            "role": "mlp.down",
            "layer": [0, 0],
            "values": [100, 300],
            "spikes": [100.0, 600.0],
            "nmse": [1e-4, 1e-2],
        }
    )
    error = lines(figures.error_per_layer(experts))["mlp.down"]
    rate = lines(figures.spike_rate_per_layer(experts))["mlp.down"]
    np.testing.assert_allclose(error.get_ydata(), [1e-3])
    np.testing.assert_allclose(rate.get_ydata(), [700 / 400])


def test_the_head_stands_after_the_last_layer(per_site):
    figure = figures.error_per_layer(per_site)
    assert list(lines(figure)["head.in"].get_xdata()) == [LAYERS]
    labels = {tick.get_text(): tick.get_position()[0] for tick in figure.axes[0].get_xticklabels()}
    assert labels["head"] == LAYERS and labels["0"] == 0
    assert str(LAYERS) not in labels


def test_every_role_can_be_told_apart(per_site):
    figure = figures.error_per_layer(per_site)
    drawn = lines(figure)
    assert list(drawn) == list(figures.ROLES)
    assert len({to_hex(line.get_color()) for line in drawn.values()}) == len(figures.ROLES)
    assert len({line.get_marker() for line in drawn.values()}) == len(figures.ROLES)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(figures.ROLES)


def test_legend_is_outside_the_axes_and_inside_the_page(per_site):
    figure = figures.error_per_layer(per_site)
    assert png(figure).shape[1] == figures.WIDTH * figure.dpi
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= figure.axes[0].get_window_extent().x1
    assert legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize("nmse", [None, float("nan")])
def test_an_undefined_error_is_said_not_drawn(per_site, nmse):
    figure = figures.error_per_layer(per_site.assign(nmse=pd.Series(nmse, per_site.index, float)))
    assert not lines(figure)
    assert "undefined" in figure.axes[0].texts[0].get_text()
    png(figure)


def test_density_panel_shows_both_densities_and_every_level_but_zero():
    density = role_density()
    axes = figures.density_with_levels({"attn.in": density}).axes[0]
    p, best = axes.get_lines()
    np.testing.assert_allclose(p.get_ydata(), np.exp(-p.get_xdata()))
    np.testing.assert_allclose(best.get_ydata(), np.exp(-best.get_xdata() / 3) / 3)
    assert best.get_linestyle() == "--" and p.get_xdata().min() > 0
    ticks = [segment[0, 0] for segment in axes.collections[0].get_segments()]
    np.testing.assert_allclose(sorted(ticks), np.arange(1, 64) / 4)
    assert axes.get_xlim()[0] < min(ticks) and axes.get_xlim()[1] > max(ticks)


@pytest.mark.parametrize("count", [1, 3, len(figures.ROLES)])
def test_density_has_a_panel_per_role_and_one_for_the_legend(count):
    roles = {role: role_density() for role in list(figures.ROLES)[:count]}
    figure = figures.density_with_levels(dict(reversed(roles.items())))
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == list(roles)
    labels = [text.get_text() for text in figure.axes[count].get_legend().get_texts()]
    assert len(labels) == 3 and "optimal" in labels[1]
    assert png(figure).shape[1] == figures.WIDTH * figure.dpi


def test_a_neuron_without_levels_still_has_its_density():
    bare = role_density()
    bare = figures.RoleDensity(bare.x, bare.density, bare.optimal, np.zeros(1))
    assert len(figures.density_with_levels({"attn.in": bare}).axes[0].get_lines()) == 2


def test_no_figure_is_left_with_pyplot(per_site):
    figures.spike_rate_per_layer(per_site)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def result(name: str, steps: int | None, ppl: float, energy: float | None, **more) -> dict:
    label = name if steps is None else f"{name} T={steps} n={more.get('grains', 1)}"
    numbers = {"timesteps": steps, "grains": 1, "ppl_a": ppl, "energy_J": energy}
    return {"model": "tiny", "coding": name, "label": label} | numbers | more


RESULTS = [
    result("dense", None, 20, 1, grains=None),
    result("las", 6, 800, 0.3),
    result("las", 4, 3e6, 0.2),
    result("las", 8, 30, 0.5),
    result("ttfs", 128, 40, 0.6),
    result("bound", 6, 21, None),
    result("bound", 8, 20.5, None),
]


def test_perplexity_by_steps_is_the_data_in_order_and_diverged_rows_are_named():
    frame = comparisons.comparison_frame(RESULTS)
    figure = comparisons.perplexity_by(frame, "timesteps")
    (axes,) = figure.axes
    drawn = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker()]
    moving = [points for points in drawn if points[0][0] >= 4]
    assert [[6, 800], [8, 30]] in moving and [[6, 21], [8, 20.5]] in moving
    level = sorted(line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == "-.")
    assert level == [20, 40] and axes.get_yscale() == "log"
    assert "las 1" in figure._supxlabel.get_text() and "ttfs" not in figure._supxlabel.get_text()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["dense", "las", "ttfs (T=128)", "bound"]
    assert png(figure).shape[1] == figures.WIDTH * figure.dpi


def test_a_series_is_told_by_its_grains_only_where_they_vary():
    names = comparisons.series_names(
        [
            *(result("multigrain", 6, 1, 1, grains=n) for n in (2, 3)),
            *(result("free", n, 1, 1, grains=n) for n in (4, 6)),
            result("gated2", 6, 1, 1, grains=2),
        ]
    )
    assert names == ["multigrain n=2", "multigrain n=3", "free", "free", "gated2"]


def test_transforms_have_panels_of_their_own():
    turned = [r | {"transform": t} for t in ("none", "rotate") for r in RESULTS]
    figure = comparisons.perplexity_by_energy(comparisons.comparison_frame(turned))
    assert [axes.get_title() for axes in figure.axes] == ["transform none", "transform rotate"]


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
    front, *points = figure.axes[0].get_lines()
    assert front.get_xydata().tolist() == [[0.3, 800], [0.5, 30], [1, 20]]
    assert sum(len(line.get_xydata()) for line in points) == 4
    assert [text.get_text() for text in figure.axes[0].texts] == ["6", "8"]


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


def test_level_densities_have_a_row_a_site_and_a_curve_a_coding():
    x = np.geomspace(1e-3, 10, 100)
    curves = {f"c{i}": np.full(100, 0.1 * (i + 1)) for i in range(7)}
    sites = [
        comparisons.SiteLevels(name, x, np.exp(-x), np.exp(-x / 3) / 3, curves) for name in "ab"
    ]
    figure = comparisons.level_densities(sites, "T = 6")
    assert len(figure.axes) == 4  # two columns of at most five
    drawn = [len(axes.get_lines()) - 2 for axes in figure.axes]
    assert drawn == [4, 3, 4, 3]
    last = figure.axes[3].get_lines()[-1]
    np.testing.assert_allclose(last.get_ydata(), 0.7)
    assert png(figure).shape[1] == figures.WIDTH * figure.dpi


def test_convergence_is_summed_up_by_role_and_counted():
    nan = float("nan")
    numbers = {"C_relative": 0.5, "last_relative": 0.6, "R2": 0.9}
    fits = pd.DataFrame(
        [
            {"role": "mlp.in", "rho": 0.9, "C": 1.0, "settled": True} | numbers,
            {"role": "mlp.in", "rho": 0.8, "C": 3.0, "settled": False} | numbers,
            {"role": "head.in", "rho": nan, "C": 5.0, "settled": False} | numbers,
        ]
    )
    summed = convergence.by_role(fits).set_index("role")
    assert summed.loc["mlp.in", ["sites", "fell", "settled"]].tolist() == [2, 2, 1]
    assert summed.loc["head.in", ["sites", "fell", "settled"]].tolist() == [1, 0, 0]
    assert summed.loc["mlp.in", "C"] == 2 and summed.loc["mlp.in", "rho"] == pytest.approx(0.85)
    less = summed.reset_index().assign(slope=5.0, C=[2.0, 5.0])
    more = less.assign(slope=80.0, C=[1.0, 6.0])
    both = pd.concat([less, more])
    text = convergence.caption(both)
    assert "from slope 5 to 80 C shrinks in 1 of 2 rows" in text and "in 0 of 2 rows" in text
    lines = convergence.limit_by_slope(both).axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["mlp.in", "head.in"]
    assert all(list(line.get_xdata()) == [5, 80] for line in lines)
