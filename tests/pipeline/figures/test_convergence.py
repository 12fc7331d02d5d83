"""Convergence fits: planted curves come back, agree with scipy's optimiser, and keep their bounds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import least_squares

from pipeline.figures import convergence
from stages.analysis.convergence import fit_decay
from stages.errors import InputError

K = 161


def curve(limit: float, amplitude: float, rate: float, size: int = K) -> torch.Tensor:
    return limit + amplitude * rate ** torch.arange(size, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_planted_curves_come_back(scale):
    planted = [(0.3, 0.7, 0.5), (0.02, 1.0, 0.95), (0.0, 0.4, 0.99), (0.9, 0.1, 0.8)]
    found = fit_decay(scale * torch.stack([curve(*one) for one in planted]))
    for row, (limit, amplitude, rate) in enumerate(planted):
        assert float(found.limit[row]) == pytest.approx(scale * limit, rel=1e-3, abs=1e-4 * scale)
        assert float(found.amplitude[row]) == pytest.approx(scale * amplitude, rel=1e-3)
        assert float(found.rate[row]) == pytest.approx(rate, abs=1e-4)
        assert float(found.r2[row]) == pytest.approx(1, abs=1e-6)


def test_a_noisy_curve_is_fitted_as_well_as_by_a_general_optimiser():
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(3, K, generator=generator, dtype=torch.float64)
    y = torch.stack([curve(0.5, 1, 0.9), curve(0.2, 2, 0.97), curve(1, 0.3, 0.6)]) + noise
    found = fit_decay(y)
    for row in range(3):
        best = min(
            least_squares(
                lambda p, row=row: p[0] + p[1] * p[2] ** np.arange(K) - y[row].numpy(),
                (0.1, 0.5, start),
                bounds=([0, 0, 1e-6], [np.inf, np.inf, 1 - 1e-6]),
            ).cost
            for start in (0.3, 0.9, 0.98)
        )
        spread = float(((y[row] - y[row].mean()) ** 2).sum())
        assert float(found.r2[row]) == pytest.approx(1 - 2 * best / spread, abs=1e-6)
        assert 0 < found.r2[row] < 1


def test_a_curve_is_fitted_by_itself_whatever_stands_beside_it():
    y = torch.stack([curve(0.1 * i, 1.0, 0.5 + 0.01 * i) for i in range(40)])
    together = fit_decay(y)
    for row in (0, 31, 32, 39):
        alone = fit_decay(y[row : row + 1])
        assert torch.equal(alone.rate[0], together.rate[row])


def test_bounds_hold_where_the_free_optimum_breaks_them():
    straight = torch.linspace(1, 0.5, K, dtype=torch.float64)[None]  # the free limit is far below 0
    found = fit_decay(straight)
    assert float(found.limit) >= 0 and 0 < float(found.rate) < 1 and float(found.r2) > 0.95
    rising = torch.linspace(0.5, 1, K, dtype=torch.float64)[None]
    found = fit_decay(rising)
    assert float(found.amplitude) == 0 and torch.isnan(found.rate).all()
    assert float(found.limit) == pytest.approx(0.75) and float(found.r2) == pytest.approx(0)


def test_a_constant_curve_has_a_limit_and_nothing_else():
    found = fit_decay(torch.full((1, K), 0.25))
    assert float(found.limit) == pytest.approx(0.25)
    assert torch.isnan(found.r2).all()


def test_an_oscillating_curve_is_not_called_a_good_fit():
    k = torch.arange(K, dtype=torch.float64)
    assert float(fit_decay((1 + torch.sin(k / 3))[None]).r2) < 0.2


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.full((1, 9), torch.nan)])
def test_what_cannot_be_fitted_is_refused(bad):
    with pytest.raises(InputError, match="loss curves"):
        fit_decay(bad)


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


def test_the_figure_has_the_quartiles_of_the_sites_as_bars():
    fits = [
        {"role": "mlp.in", "rho": rho, "C": 1.0, "settled": True, "R2": 0.9, "last_relative": 1.0}
        | {"C_relative": rho / 2}
        for rho in (0.5, 0.6, 0.7, 0.8, 0.9)
    ]
    summed = convergence.by_role(pd.DataFrame(fits))
    frame = pd.concat([summed.assign(slope=slope) for slope in (5.0, 80.0)])
    limits, rates = convergence.limit_by_slope(frame).axes
    for axes, ends in ((limits, [0.3, 0.4]), (rates, [0.6, 0.8])):
        (bars,) = axes.collections
        assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
            pytest.approx(ends),
            pytest.approx(ends),
        ]


def test_what_no_role_has_is_no_panel_and_a_role_without_points_no_entry():
    shared = {"slope": [5.0, 80.0] * 2, "C_relative": [0.5, 0.4, float("nan"), float("nan")]}
    frame = pd.DataFrame({"role": ["mlp.in"] * 2 + ["head.in"] * 2} | shared)
    frame = frame.assign(**dict.fromkeys(convergence.ENDS, float("nan")))
    figure = convergence.limit_by_slope(frame.assign(rho=float("nan")))  # no curve has fallen
    assert [axes.get_ylabel() for axes in figure.axes] == ["C / first loss"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mlp.in"]
    both = convergence.limit_by_slope(frame.assign(rho=[0.9, 0.9, 0.8, 0.8]))
    assert len(both.axes) == 2 and all(axes.has_data() for axes in both.axes)
    assert [text.get_text() for text in both.legends[0].get_texts()] == ["mlp.in", "head.in"]
