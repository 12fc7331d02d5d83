"""Figures: what is drawn equals the data, what is missing is seen, and files are fit for a paper."""

import logging
import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import rgb_to_hsv
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from pipeline.figures import comparisons, sites, style

LAYERS = 4
ROOT = Path(__file__).parents[3]


def every_site() -> pd.DataFrame:
    """Every role of a few layers and the head, all with numbers of their own."""
    rows = []
    for number, role in enumerate(style.ROLES):
        for layer in [-1] if role == "head.in" else range(LAYERS):
            values = 1000 * (layer + 2)
            spikes = values * (0.5 + 0.1 * number)
            nmse = 10.0 ** (-4 + 0.2 * number - 0.1 * layer)
            rows.append((f"{layer}.{role}", role, layer, values, spikes, nmse, spikes / values))
    names = ["site", "role", "layer", "values", "spikes", "nmse", "spikes_per_value"]
    return pd.DataFrame(rows, columns=names)


@pytest.fixture
def per_site() -> pd.DataFrame:
    return every_site()


def role_density() -> sites.RoleDensity:
    """Give an exponential density on a grid that starts at zero, with a hole in its tail."""
    x = np.concatenate([[0.0], np.geomspace(1e-6, 20, 400)])
    density = np.where((x > 12) & (x < 13), 0, np.exp(-x))
    return sites.RoleDensity(x, density, np.exp(-x / 3) / 3, np.arange(64) / 4)


def png(figure) -> np.ndarray:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return imread(BytesIO(buffer.getvalue()))


def cells(axes) -> dict[tuple[str, int], float]:
    """What a heat map shows: its values by role and layer, -1 for the head."""
    names = dict(
        zip(axes.get_yticks(), (t.get_text() for t in axes.get_yticklabels()), strict=True)
    )
    found = {}
    for mesh in axes.collections:
        assert isinstance(mesh, QuadMesh)
        corners, values = mesh.get_coordinates(), mesh.get_array()
        for (row, column), value in np.ndenumerate(values.filled(np.nan)):
            box = corners[row : row + 2, column : column + 2].reshape(4, 2)
            role, x = names[box[:, 1].mean()], box[:, 0].mean()
            found[role, -1 if role == sites.HEAD else round(x)] = float(value)
    return found


def holes(axes) -> int:
    return len([p for p in axes.patches if isinstance(p, Rectangle) and p.get_hatch()])


@pytest.mark.parametrize(
    ("draw", "column"),
    [
        (sites.error_per_layer, "nmse"),
        (sites.spike_rate_per_layer, "spikes_per_value"),
    ],
)
def test_a_heat_map_has_every_site_and_the_head_as_a_cell_of_its_own(per_site, draw, column):
    axes, bar = draw({"a": per_site}).axes
    expected = per_site.set_index(["role", "layer"])[column]
    assert cells(axes) == pytest.approx(expected.to_dict())
    assert holes(axes) == 0 and len(axes.collections) == 2
    layers, head = (mesh.get_coordinates() for mesh in axes.collections)
    assert head[0, 0, 1] > layers[-1, 0, 1]  # a gap: the axis points downwards
    assert np.ptp(head[..., 0]) == np.ptp(layers[..., 0])
    assert (bar.get_yscale() == "log") == (column == "nmse")


def test_several_sites_of_a_layer_are_one_cell():
    experts = pd.DataFrame(
        {
            "role": "mlp.down",
            "layer": [0, 0],
            "values": [100, 300],
            "spikes": [100.0, 600.0],
            "nmse": [1e-4, 1e-2],
        }
    )
    error = cells(sites.error_per_layer({"a": experts}).axes[0])
    rate = cells(sites.spike_rate_per_layer({"a": experts}).axes[0])
    assert error["mlp.down", 0] == pytest.approx(1e-3)
    assert rate["mlp.down", 0] == pytest.approx(700 / 400)


def test_cells_without_a_value_are_hatched_and_said(per_site):
    lost = (per_site["role"] == "mlp.up") | (per_site["site"].isin(["1.attn.q", "-1.head.in"]))
    figure = sites.error_per_layer({"a": per_site[~lost]})
    axes = figure.axes[0]
    assert holes(axes) == LAYERS + 1 + 1
    shown = cells(axes)
    empty = {place for place, value in shown.items() if np.isnan(value)}
    assert empty == {("attn.q", 1), ("head.in", -1), *(("mlp.up", i) for i in range(LAYERS))}
    assert figure._supxlabel.get_text() == "layer\nhatched: no value"  # below the label
    whole = sites.error_per_layer({"a": per_site})
    assert "hatched" not in whole._supxlabel.get_text()
    # A hatched cell is what is seen there: white with lines, no colour.
    pixels = png(figure)
    x, y = axes.transData.transform([(0.5, 1)])[0]
    width = axes.transData.transform([(1, 1)])[0][0] - x
    box = pixels[:, int(x + 0.3 * width) : int(x + 1.7 * width)]
    colours = rgb_to_hsv(box[int(box.shape[0] - y) - 3 : int(box.shape[0] - y) + 3, :, :3])
    assert colours[..., 1].max() < 0.05 < colours[..., 2].max()


def test_a_colour_means_the_same_in_every_panel(per_site):
    worse = per_site.assign(nmse=per_site["nmse"] * 1e3)
    figure = sites.error_per_layer({"better": per_site, "worse": worse})
    better, other, bar = figure.axes
    assert [axes.get_title() for axes in (better, other)] == ["better", "worse"]
    scales = {(m.norm.vmin, m.norm.vmax) for axes in (better, other) for m in axes.collections}
    (scale,) = scales
    assert scale == pytest.approx((per_site["nmse"].min(), worse["nmse"].max()))


def test_a_page_has_room_for_as_many_maps_as_a_sweep_draws(per_site):
    from pipeline.commands.sweep import MAPS

    runs = {f"signed_digit{i} T=6": per_site for i in range(MAPS)}
    figure = sites.error_per_layer(runs)
    assert figure.get_figheight() < 9  # inches, the height of a page of ICLR and NeurIPS
    png(figure)
    boxes = [axes.title.get_window_extent() for axes in figure.axes[:MAPS]]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    labels = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    upper, lower = labels[:-1], labels[1:]
    # A box has some air around its letters.
    assert not any(
        a.shrunk(1, 0.8).overlaps(b.shrunk(1, 0.8)) for a, b in zip(upper, lower, strict=True)
    )


@pytest.mark.parametrize("nmse", [None, float("nan")])
def test_an_undefined_error_is_said_not_drawn(per_site, nmse):
    bare = per_site.assign(nmse=pd.Series(nmse, per_site.index, float))
    figure = sites.error_per_layer({"a": bare})
    assert np.isnan(list(cells(figure.axes[0]).values())).all()
    assert holes(figure.axes[0]) == len(per_site) and len(figure.axes) == 1
    png(figure)


def written(folder: Path) -> dict[str, list[Path]]:
    """One figure of each kind as files."""
    per_site = every_site()
    results = [
        {"model": "tiny", "coding": name, "label": f"{name} T={steps}", "timesteps": steps}
        | {"grains": 1, "bits": steps, "ppl_a": 20 + steps, "energy_J": steps}
        for name in ("las", "gated")
        for steps in (4, 6)
    ]
    frame = comparisons.comparison_frame(results)
    drawn = {
        "error": sites.error_per_layer({"a": per_site[per_site["role"] != "mlp.up"]}),
        "density": sites.density_with_levels({"attn.in": role_density()}),
        "bits": comparisons.perplexity_by(frame, "bits"),
        "energy": comparisons.perplexity_by_energy(frame),
    }
    for figure in drawn.values():
        for text in figure.findobj(Text):
            assert text.get_fontsize() >= 7 or not text.get_text()
    return {name: style.save(figure, folder / name) for name, figure in drawn.items()}


def test_embedding_fonts_says_nothing_in_the_log_of_a_run(per_site, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        style.save(sites.error_per_layer({"run": per_site}), tmp_path / "x")
    assert not caplog.records


def test_files_have_the_width_of_a_page_and_embedded_fonts(tmp_path):
    for png_file, pdf_file in written(tmp_path).values():
        assert imread(png_file).shape[1] == round(5.5 * 200)
        pdf = pdf_file.read_bytes()
        (box,) = re.findall(rb"/MediaBox \[ *0 0 ([\d.]+) ([\d.]+) *\]", pdf)
        assert float(box[0]) == 5.5 * 72
        fonts, files = (len(re.findall(p, pdf)) for p in (rb"/Type /Font\b(?!D)", rb"/FontFile2"))
        assert files >= 1 and fonts >= files
        assert b"/Type3" not in pdf and b"CreationDate" not in pdf


@pytest.mark.slow
def test_the_same_frame_gives_the_same_bytes_in_another_process(tmp_path):
    """Its sets have another order and its clock has gone on."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    written(here)
    script = f"from tests.pipeline.figures.test_figures import *; written(Path({str(there)!r}))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)
    names = sorted(path.name for path in here.iterdir())
    assert len(names) == 8
    assert [(here / n).read_bytes() == (there / n).read_bytes() for n in names] == [True] * 8


def test_density_panel_shows_both_densities_and_every_level_but_zero():
    density = role_density()
    axes = sites.density_with_levels({"attn.in": density}).axes[0]
    p, best = axes.get_lines()
    np.testing.assert_allclose(p.get_ydata(), np.exp(-p.get_xdata()))
    np.testing.assert_allclose(best.get_ydata(), np.exp(-best.get_xdata() / 3) / 3)
    assert best.get_linestyle() == "--" and p.get_xdata().min() > 0
    ticks = [segment[0, 0] for segment in axes.collections[0].get_segments()]
    np.testing.assert_allclose(sorted(ticks), np.arange(1, 64) / 4)
    assert axes.get_xlim()[0] < min(ticks) and axes.get_xlim()[1] > max(ticks)


@pytest.mark.parametrize("count", [1, 3, len(style.ROLES)])
def test_density_has_a_panel_per_role_and_none_that_is_empty(count):
    roles = {role: role_density() for role in list(style.ROLES)[:count]}
    figure = sites.density_with_levels(dict(reversed(roles.items())))
    assert [axes.get_title() for axes in figure.axes] == list(roles)
    assert all(axes.axison and axes.has_data() for axes in figure.axes)
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == 3 and "optimal" in labels[1]
    assert png(figure).shape[1] == style.WIDTH * figure.dpi
    top = max(axes.title.get_window_extent().y1 for axes in figure.axes)
    assert legend.get_window_extent().y0 >= top - 1


@pytest.mark.parametrize("count", [1, 5, 9])
def test_maps_leave_no_empty_panel_and_number_the_layers_under_every_column(per_site, count):
    figure = sites.error_per_layer({f"run {i}": per_site for i in range(count)})
    maps = figure.axes[:-1]  # the last is the bar of colours
    assert len(maps) == count and all(axes.has_data() for axes in figure.axes)
    png(figure)
    below = [axes for axes in maps if any(t.get_visible() for t in axes.get_xticklabels())]
    assert below == maps[-min(count, sites.MAPS_A_ROW) :]


def test_a_neuron_without_levels_still_has_its_density():
    bare = role_density()
    bare = sites.RoleDensity(bare.x, bare.density, bare.optimal, np.zeros(1))
    figure = sites.density_with_levels({"attn.in": bare})
    assert len(figure.axes[0].get_lines()) == 2
    assert [
        text.get_text() for text in figure.legends[0].get_texts() if "levels" in text.get_text()
    ] == []


def test_no_figure_is_left_with_pyplot(per_site):
    sites.spike_rate_per_layer({"a": per_site})
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
