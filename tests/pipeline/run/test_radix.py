"""Digits in a larger base as a user asks for them: spikes, steps, energy and table of a run."""

import pandas as pd
import pytest

from pipeline.run import runner

SPIKES = {"linear", "qk", "pv"}


@pytest.fixture(scope="module")
def done(command, tmp_path_factory):
    options = ("coding=gated", "coding.radix=2,4,64", "timesteps=6")
    return command(tmp_path_factory.mktemp("radix"), *options)


def test_a_larger_base_has_fewer_spikes_more_steps_and_the_same_model(done):
    assert done.code == 0, done.err
    results = done.results
    assert [result["steps"] for result in results] == [6, 9, 63]
    assert len({result["ppl_wikipedia"] for result in results}) == 1
    assert len({result["nmse"] for result in results}) == 1
    planes, digits, once = (result["spikes_per_value"] for result in results)
    assert planes > digits > once and once < 1
    assert [result["convention"] for result in results] == ["bit_plane", "digit", "digit"]


def test_the_steps_stand_beside_the_timesteps(done):
    frame = pd.read_csv(done.table)
    assert list(frame).index("steps") == list(frame).index("timesteps") + 1
    assert list(frame["steps"]) == [6, 9, 63]
    (head,) = [line for line in done.out.splitlines() if line.startswith("model ")]
    assert "T  steps  n" in head


def test_decoding_is_additions_in_the_causal_convention(settings, tmp_path):
    """Two ranges with three digits of three slots each: 18 additions where 2 multiplications are."""
    _, sites, run = runner.execute(settings(tmp_path, "coding=gated", "coding.radix=4"))
    assert set(sites["decode_macs"]) == {2} and set(sites["decode_acs"]) == {18}
    assert set(sites["comparisons"]) == {1} and set(sites["steps"]) == {9}
    frame = pd.read_parquet(run.artifacts["energy"].path / "operations.parquet")
    decoded = frame[frame["kind"] == "decode_scaling"]
    assert set(decoded["convention"]) == {"causal"}
    assert (decoded["acs"] == 9 * decoded["macs"]).all() and decoded["macs"].min() > 0
    products = frame[frame["kind"].isin(SPIKES) & (frame["convention"] == "causal")]
    assert set(products["op"]) == set(decoded["op"])


def test_the_dense_model_and_bounds_have_no_steps(settings, tmp_path):
    for coding in ("dense", "lloyd_max"):
        result, sites, _ = runner.execute(settings(tmp_path, f"coding={coding}"))
        assert result["steps"] is None and sites["steps"].isna().all()
