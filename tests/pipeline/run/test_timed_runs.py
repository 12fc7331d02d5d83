"""One spike in time, and codes by site, as a user asks for them: rows, figures, energy and refusals."""

import math
from contextlib import chdir

import pandas as pd
import pytest

from pipeline.figures import sites
from pipeline.results.folders import RunFolder
from pipeline.run import runner

pytestmark = pytest.mark.slow

SENSITIVE = ("coding.sensitivity.windows=2",)


@pytest.fixture(scope="module")
def done(command, tmp_path_factory):
    """A sweep over both kinds of levels, with the figures of a sweep and of its jobs."""
    options = ("coding=timed", "coding.timesteps=16", "coding.levels=shifts,free")
    return command(tmp_path_factory.mktemp("timed"), *options, "runtime.figures=true")


def test_a_value_has_one_spike_at_most_in_sixteen_slots(done):
    assert done.code == 0, done.err
    for result in done.results:
        assert result["steps"] <= 16 and result["spikes_per_value"] < 1
        assert result["convention"] == "one_spike" and result["bits"] == math.log2(17)
        assert result["nmse"] < 0.02
    shifts, free = done.results
    assert free["nmse"] < shifts["nmse"]
    assert free["energy_J"] > shifts["energy_J"]  # a multiplication a slot


def drawn(done) -> list[set[str]]:
    """Figures that every job of a sweep has by itself."""
    jobs = [RunFolder(path) for path in sorted(done.runs.glob("[0-9]*"))]
    with chdir(done.cwd):  # the store's path in a run folder is relative
        return [set(sites.pictures(job)) for job in jobs]


def test_their_figures_are_drawn(done):
    """The density of levels on λ* among them, of both kinds."""
    names = {path.name.partition("_")[2] for path in done.cwd.glob("outputs/tables/*.png")}
    assert any(name.endswith("levels.png") for name in names)
    every = {"density_and_levels", "error_per_layer", "spike_rate_per_layer"}
    assert drawn(done) == [every, every]


def test_decoding_by_site_is_in_the_energy(settings, tmp_path):
    result, frame, run = runner.execute(
        settings(tmp_path, "coding=timed", "coding.timesteps=8", "coding.grains=2")
    )
    assert set(frame["comparisons"]) <= {0, 1} and frame["steps"].max() == 8 == result["steps"]
    assert (frame["decode_acs"] <= 16).all() and frame["decode_acs"].max() > 8
    frame = pd.read_parquet(run.artifacts["energy"].path / "operations.parquet")
    decoded = frame[(frame["kind"] == "decode_scaling") & (frame["convention"] == "causal")]
    assert decoded["macs"].min() > 0 and decoded["acs"].min() > 0


def test_codes_by_site(command, tmp_path):
    options = ("coding=mixed", *SENSITIVE, "coding.timesteps=16", "coding.mu=0.3")
    options = (*options, "coding.centre=none")  # else channels have levels of their own
    done = command(tmp_path, *options, "runtime.figures=true", "evaluation.anytime=true")
    assert done.code == 0, done.err
    (result,) = done.results
    assert result["steps"] <= 16 and result["bits"] is None and result["convention"] == "mixed"
    steps = result["anytime"]
    assert list(steps) == [str(t) for t in range(1, result["steps"] + 1)]
    assert steps[str(result["steps"])] == result["ppl_wikipedia"] != steps["1"]
    assert drawn(done) == [{"density_and_levels", "error_per_layer", "spike_rate_per_layer"}]
    frame = pd.read_csv(done.table)
    assert "bits" not in frame or frame["bits"].isna().all()


def test_a_step_by_step_curve_of_a_thousand_passes_is_refused_in_a_line(command, tmp_path):
    """T=10 as one spike in time takes 1023 steps."""
    options = (
        "coding=gated",
        "coding.timesteps=10",
        "coding.radix=1024",
        "evaluation.anytime=true",
    )
    done = command(tmp_path, *options)
    assert done.code == 1
    assert "takes 1023 of them, more than 256: give fewer coding.timesteps" in done.err
    assert done.err.count("\n") == 1
