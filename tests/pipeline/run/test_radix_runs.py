"""Digits in a larger base as a user asks for them: spikes, steps, energy and table of a run."""

import pandas as pd
import pytest

from pipeline.commands.energy import main
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


# --- the rates of a run on another model ----------------------------------------------------------


def shares(text: str) -> list[float]:
    """Of the dense model's energy at 45 nm, by convention and phase."""
    rows = [line.split() for line in text.splitlines()]
    return [float(row[2]) for row in rows if row[:1] == ["45nm"]]


def test_the_rates_of_a_run_on_its_own_model_give_its_energy(done, tiny_run, capsys):
    """All layers have the same dimensions, so that means over them change nothing."""
    for job, result in enumerate(done.results):
        place = done.runs / str(job)
        options = [f"model.path={tiny_run.model}", "energy.tokens=48", f"rates={place}"]
        assert main(options) == 0
        parts = [result["paper"], result["paper_decode"], result, result["decode"]]
        expected = [1 - part["saving"] for part in parts]
        assert shares(capsys.readouterr().out) == pytest.approx(expected, abs=1e-4)


def test_the_rates_of_a_run_on_another_model_carry_its_decoding(done, capsys):
    """One spike in time: 2 x 63 additions an accumulator, which are cheap beside 4096 inputs."""
    options = ["model=llama3-8b", "energy.tokens=512", f"rates={done.runs / '2/result.json'}"]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert out.startswith("model llama3-8b, rates of gated T=6 n=2")
    rows = [line.split() for line in out.splitlines() if line.startswith("decode_scaling ")]
    prefill = rows[0]  # of the causal convention: the paper's counts no decoding
    outputs = 512 * (32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096) + 128256)
    outputs += 32 * (2 * 32 * 512 * 513 // 2 + 2 * 32 * 128 * 512)
    assert float(prefill[2]) == pytest.approx(2 * outputs / 1e9, rel=1e-6)
    assert float(prefill[3]) == pytest.approx(2 * 63 * outputs / 1e9, rel=1e-6)


@pytest.mark.parametrize(
    ("place", "says"), [("", "3 results; give the folder of one job"), ("nowhere", "0 results")]
)
def test_rates_that_are_not_those_of_one_run_are_refused_in_a_line(done, capsys, place, says):
    assert main(["energy.tokens=48", f"rates={done.runs / place}"]) == 1
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
