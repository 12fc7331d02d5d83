"""Figures: what is drawn equals the data, every role can be told apart, nothing is cut off."""

import sys
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from pipeline import figures

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
