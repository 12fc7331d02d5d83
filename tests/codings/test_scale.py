"""What the trained neurons normalise by: the largest magnitude, or one that clips."""

from dataclasses import replace

import pytest
import torch

from stages.codings.base import site_params
from stages.codings.multigrain import Multigrain
from stages.errors import InputError
from stages.fits.algorithm1 import Algorithm1
from tests.codings.reference import atoms_of, heavy_tailed

SHORT = Algorithm1(rounds=3, neuron_steps=4, base_steps=5, neuron_lr=3e-3, base_lr=2e-3, slope=100)


def test_a_smoothed_range_clips_and_is_learned_with() -> None:
    """tau at half of the maximum: the fit minimises the error of values that are cut off."""
    x = heavy_tailed(2, 400)
    top = x.abs().amax(-1)
    atoms = replace(atoms_of(x), statistics={"running_maximum": {"maximum": top / 2}})
    coding = Multigrain(
        "multigrain", 6, 2, "half_step", False, tau="running_maximum", algorithm1=SHORT
    )
    assert [s.name for s in coding.statistics] == ["running_maximum"]
    fit = coding.fit(atoms)
    assert fit.curve is not None and torch.equal(fit.params["scale"], top / 2)
    for k in range(2):
        value, _ = coding.quantise(x[k], site_params(fit.params, k))
        clipped = x[k].abs() > 0.75 * top[k]
        assert bool(clipped.any()) and bool((value[clipped].abs() < 0.6 * top[k]).all())
        error = (value - x[k]).square().mean() / (top[k] / 2) ** 2
        torch.testing.assert_close(error, fit.curve[k].min(), rtol=1e-4, atol=0)


def test_the_largest_magnitude_needs_no_statistic() -> None:
    coding = Multigrain("multigrain", 6, 2, "half_step", False)
    assert coding.tau == "maximum" and coding.statistics == ()
    with pytest.raises(InputError, match="coding.tau='percentile'"):
        Multigrain("multigrain", 6, 2, "half_step", False, tau="percentile")


def test_an_absolute_slope_is_the_relative_one_times_tau() -> None:
    """Sites of one shape whose largest values are 1 and 8."""
    u = heavy_tailed(1, 400)
    u = u / u.abs().amax()
    atoms = atoms_of(torch.cat([u, 8 * u]))
    fits = {}
    for units, slope in (("relative", 10.0), ("relative", 80.0), ("absolute", 10.0)):
        algorithm = Algorithm1(2, 5, 5, 2e-3, 2e-3, slope, slope_units=units)
        fits[units, slope] = Multigrain("multigrain", 6, 2, algorithm1=algorithm).fit(atoms).params
    for name in ("base_d", "base_h", "base_theta"):
        gentle, steep, absolute = (each[name] for each in fits.values())
        assert torch.equal(absolute[0], gentle[0]) and torch.equal(absolute[1], steep[1])
        assert not torch.equal(gentle, steep) or name == "base_d"
    with pytest.raises(InputError, match="slope_units='tau': choose relative or absolute"):
        Algorithm1(slope_units="tau")
