"""Hardware profiles: measured numbers of other packages, hand-made sums, and break-even."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf

from pipeline.run import hardware
from pipeline.run.shipped import CONF, choices, names
from stages.analysis.operations import Amount, Operation, operations
from stages.analysis.rates import by_role
from stages.energy import Energy, account, by_part, compared, of_model, spent
from stages.errors import InputError
from stages.model.loading import meta_model
from stages.model.sites import find_sites
from stages.profiles.base import PARTS, Counts, Integers, Profile
from tests.stages.test_energy import MINI, MINI_COUNTERS, TOKENS, Costs, counters_of, plan_of, tiny

INPUTS, OUTPUTS = 576, 1536
LAYER = {
    "inputs": INPUTS,
    "outputs": OUTPUTS,
    "weights": INPUTS * OUTPUTS,
    "stored": INPUTS * OUTPUTS,
}


def work(**counts: float) -> pd.DataFrame:
    """One row of work of a linear layer that sees one token."""
    return pd.DataFrame([{"kind": "linear", **Counts(**counts)._asdict()}])  # type: ignore[arg-type]


def dense(rows: int = 1, **counts: float) -> pd.DataFrame:
    many = {name: LAYER[name] * rows for name in ("inputs", "outputs")}
    products = {"macs": rows * INPUTS * OUTPUTS, "acs": 0}
    return work(**{**products, **LAYER, **many, "rows": rows, **counts})


def spiking(rate: float, rows: int = 1, steps: int = 6, **counts: float) -> pd.DataFrame:
    spikes = rate * INPUTS * rows
    fired = {"acs": spikes * OUTPUTS, "spikes": spikes, "entered": rows * INPUTS * OUTPUTS}
    return dense(rows, dense=0, steps=steps, **fired, **counts).assign(macs=0.0)


def parts(profile: Profile, frame: pd.DataFrame) -> dict[str, float]:
    """Joules by part."""
    return profile.spent(frame).groupby("part")["J"].sum().to_dict()


def joules(name: str, frame: pd.DataFrame, **changes: Any) -> float:
    return float(replace(hardware.profile(name), **changes).spent(frame)["J"].sum(skipna=False))


# What other packages measured


@pytest.mark.parametrize(
    ("frame", "microjoules"),
    [
        (dense(), 91.32),
        (spiking(0.75), 76.44),
        (spiking(1.0), 101.92),
        (spiking(2.0), 203.85),
    ],
)
def test_lemaire_is_that_of_spikingjelly(frame: pd.DataFrame, microjoules: float) -> None:
    """`estimate_lemaire_energy` of spikingjelly 2.0.0 on Linear(576, 1536), dense and in six planes."""
    assert joules("lemaire2022", frame) * 1e6 == pytest.approx(microjoules, abs=0.005)


def test_arithmetic_is_the_least_of_it_where_memory_counts() -> None:
    by = parts(hardware.profile("lemaire2022"), dense())
    assert by["compute"] / sum(by.values()) == pytest.approx(0.031, abs=5e-4)


def test_an_access_of_sram_grows_with_its_size_and_not_above_a_megabyte() -> None:
    lemaire = hardware.profile("lemaire2022")
    prices = [lemaire._access(size / 4) for size in (0, 4096, 8192, 20480, 32768, 2**20, 2**30)]
    assert prices == pytest.approx([0, 5, 10, 15, 20, 100, 100])


@pytest.mark.parametrize("steps", [6, 10])
def test_loihi_has_a_step_more_than_its_spikes(steps: int) -> None:
    by = parts(hardware.profile("loihi"), spiking(1.5, steps=steps))
    spikes = 1.5 * INPUTS
    assert by["weights"] == pytest.approx(35.5e-12 * spikes * OUTPUTS)
    assert by["messages"] == pytest.approx(111e-12 * spikes * 2)  # 1536 neurons are on two cores
    assert by["potentials"] == pytest.approx(OUTPUTS * (51.2 * (steps + 1) + 21.6 * steps) * 1e-12)


def test_a_chip_without_multipliers_has_no_energy_of_a_dense_layer() -> None:
    assert joules("loihi", dense()) != joules("loihi", dense())  # NaN
    integers = dense(operand_bits=8, weight_bits=8).assign(dense=0.0)
    assert joules("loihi", integers) != joules("loihi", integers)


def test_a_token_of_a_real_model_costs_what_was_measured_of_its_layers(energy: Energy) -> None:
    """SmolLM2-135M's linear layers, one decoded token, 2 spikes a value in 6 steps, in millijoules."""
    dims = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "smollm2-135m.yaml").dims)
    model = meta_model(dims)
    sites = find_sites(model)
    coded = counters_of({site.operand: (1, 2, 1, 2) for site in sites}, steps=6)
    plan = [each for each in operations(model, sites) if each.kind == "linear"]
    frames = account(plan, energy, 1), account(plan, energy, 1, coded, Costs())
    found = compared(frames[1], frames[0], energy)["causal"]["decode"]
    theirs = compared(frames[0], frames[0], energy)["causal"]["decode"]
    for name, before, after in (("45nm", 0.619, 0.242), ("lemaire2022", 13.6, 32.2)):
        assert theirs[f"energy_J_{name}"] * 1e3 == pytest.approx(before, rel=4e-3)
        assert found[f"energy_J_{name}"] * 1e3 == pytest.approx(after, rel=4e-3)
    assert found["energy_J_loihi"] * 1e3 == pytest.approx(9.7, rel=4e-3)
    assert found["breakeven_45nm"] == pytest.approx(4.6 / 0.9)
    assert found["breakeven_lemaire2022"] == pytest.approx(0.9, abs=0.06)


# Hand-made sums


@pytest.mark.parametrize(("bits", "price"), [(4, 0.2), (6, 0.25), (8, 0.3), (32, 3.3)])
def test_integers_cost_what_their_widths_cost(bits: int, price: float) -> None:
    weight = 32 if bits == 32 else 8
    frame = dense(operand_bits=bits, weight_bits=weight).assign(dense=0.0)
    for name in ("45nm", "45nm_int8", "45nm_fp16"):
        each = joules(name, frame) / (INPUTS * OUTPUTS) * 1e12
        assert each == pytest.approx(price)
    half = frame.assign(dense=0.5)
    assert joules("45nm", half) / (INPUTS * OUTPUTS) * 1e12 == pytest.approx((price + 4.6) / 2)


def test_an_integer_row_moves_as_much_as_a_dense_one_but_for_its_widths() -> None:
    integers = dense(operand_bits=4, weight_bits=4).assign(dense=0.0)
    lemaire = hardware.profile("lemaire2022")
    ours, theirs = (parts(lemaire, frame) for frame in (integers, dense()))
    assert {k: v for k, v in ours.items() if k != "compute"} == {
        k: v for k, v in theirs.items() if k != "compute"
    }
    streamed = hardware.profile("streamed")
    ours, theirs = (parts(streamed, frame) for frame in (integers, dense()))
    assert ours["weights"] == pytest.approx(theirs["weights"] / 2)
    assert ours["inputs"] == pytest.approx(theirs["inputs"] / 2)


def test_streamed_weights_are_read_once_for_all_tokens_and_steps() -> None:
    bits = 8 * INPUTS * OUTPUTS
    for frame in (dense(512), spiking(2, 512), spiking(0.1, 1)):
        assert parts(hardware.profile("streamed"), frame)["weights"] == pytest.approx(8e-12 * bits)
    again = replace(hardware.profile("streamed"), reuse_steps=False, reuse_tokens=256, batch=4)
    assert parts(again, spiking(2, 512))["weights"] == pytest.approx(8e-12 * bits * 6 * 2 / 4)
    assert parts(again, dense(512))["weights"] == pytest.approx(8e-12 * bits * 2 / 4)


def test_streamed_potentials_are_touched_once_a_step_or_once_a_spike() -> None:
    """One input of one spike in 128 steps touches its accumulators once, not 128 times."""
    streamed = hardware.profile("streamed")
    touched = {"inputs": 4.0, "outputs": 10.0, "weights": 40.0, "stored": 40.0, "dense": 0.0}
    few = work(macs=0, acs=20, spikes=2, entered=40, steps=128, **touched)
    assert parts(streamed, few)["potentials"] == pytest.approx(2 * 20 * 32 * 0.3125e-12)
    many = work(macs=0, acs=400, spikes=40, entered=40, steps=6, **touched)
    assert parts(streamed, many)["potentials"] == pytest.approx(2 * 60 * 32 * 0.3125e-12)
    held = replace(streamed, hold_potentials=True)
    assert parts(held, many)["potentials"] == pytest.approx(2 * 10 * 32 * 0.3125e-12)


def test_the_cache_is_read_whole_and_grows_by_a_token(energy: Energy) -> None:
    only = replace(energy, profile={"streamed": hardware.profile("streamed")})
    plan = plan_of(tiny())
    table = spent(account(plan, only, TOKENS), only)
    cache = table[(table["op"] == "model.layers.0.self_attn:qk") & (table["part"] == "weights")]
    cache = cache[cache["convention"] == "causal"].set_index(["phase", "event"])["count"]
    width = 2 * 8  # two groups of keys
    assert cache["prefill", "read"] == cache["decode", "read"] == TOKENS * width
    assert cache["prefill", "write"] == TOKENS * width
    assert cache["decode", "write"] == width
    window = plan_of(tiny("mistral", sliding_window=4))
    table = spent(account(window, only, TOKENS), only).query("event == 'read' and kind == 'qk'")
    read = table[table["part"] == "weights"].groupby(["convention", "phase"])["count"].max()
    assert read["causal", "decode"] == 4 * width
    assert read["causal", "prefill"] == read["paper", "decode"] == TOKENS * width


def test_a_prefill_reads_the_experts_that_its_tokens_can_meet(energy: Energy) -> None:
    met = Operation(
        "m", "linear", 0, Amount(20), ("in",), Amount(5), inputs=Amount(4), weights=20, stored=100
    )
    frame = account([met], energy, 3).query("convention == 'causal'").set_index("phase")
    assert frame["weights"].to_dict() == {"prefill": 60, "decode": 20}
    frame = account([met], energy, 30).query("convention == 'causal'").set_index("phase")
    assert frame["weights"].to_dict() == {"prefill": 100, "decode": 20}
    assert set(frame["stored"]) == {100}


def test_operands_are_counted_as_the_sites_count_them(energy: Energy) -> None:
    """Values that enter the products of a real layer: those that its sites code."""
    frame = account(plan_of(tiny()), energy, TOKENS).query("convention == 'causal'")
    rows = frame[frame["phase"] == "prefill"].set_index("op")
    layer = "model.layers.0."
    pairs = TOKENS * (TOKENS + 1) // 2
    assert rows.loc[f"{layer}self_attn.q_proj", "inputs"] == TOKENS * 24
    assert rows.loc[f"{layer}mlp.down_proj", "inputs"] == TOKENS * 52
    assert rows.loc[f"{layer}self_attn:qk", ["inputs", "outputs"]].tolist() == [
        TOKENS * 32,
        pairs * 4,
    ]
    assert rows.loc[f"{layer}self_attn:pv", ["inputs", "outputs"]].tolist() == [
        pairs * 4,
        TOKENS * 32,
    ]
    assert rows.loc[f"{layer}self_attn:pv", "stored"] == TOKENS * 16
    assert rows.loc["lm_head", "stored"] == 24 * 40


def test_layers_of_different_steps_cost_by_role_what_they_cost_by_site(energy: Energy) -> None:
    model, only = tiny(), replace(energy, tokens=TOKENS)
    sites = find_sites(model)
    coded = counters_of({site.name: (10, 7, 10, 7) for site in sites})
    coded["role"] = [site.role for site in sites]
    coded["steps"] = [{0: 8.0, 1: 32.0}.get(site.layer, 14.0) for site in sites]
    _, by_site = of_model(model, only, coded, Costs())
    _, by_roles = of_model(model, only, by_role(coded, "these"), Costs())
    for phase, costs in by_site["causal"].items():
        assert costs["energy_J_loihi"] > 0
        for name in ("45nm", "lemaire2022", "loihi"):
            found = by_roles["causal"][phase][f"energy_J_{name}"]
            assert found == pytest.approx(costs[f"energy_J_{name}"])


# Sums and break-even


def test_parts_are_named_and_add_up_under_every_profile(energy: Energy) -> None:
    frame = account(MINI, energy, 3, counters_of(MINI_COUNTERS, 2, 7, 3), Costs())
    table = by_part(spent(frame, energy))
    assert list(energy.profiles) == choices("profile")
    assert set(table["part"]) <= set(PARTS)
    totals = table.groupby(["profile", "convention", "phase"])["J"].sum(skipna=False)
    costs = compared(frame, account(MINI, energy, 3), energy)
    for (profile, convention, phase), total in totals.items():
        assert costs[convention][phase][f"energy_J_{profile}"] == pytest.approx(total)
    assert (table["pJ"] * table["count"] * 1e-12 - table["J"]).abs().max() < 1e-20
    first = costs["causal"]["prefill"]
    assert first["energy_J"] == pytest.approx(first["energy_J_45nm"])
    assert first["saving"] == first["saving_45nm"]


def test_layers_are_summed_up_and_other_numbers_stay(energy: Energy) -> None:
    table = by_part(spent(account(plan_of(tiny()), energy, TOKENS), energy))
    ops = set(table["op"])
    assert {"model.layers.*.self_attn.q_proj", "model.layers.*.self_attn:qk", "lm_head"} <= ops
    assert not any(".0." in op or ".1." in op for op in ops)


@pytest.mark.parametrize("name", names("profile"))
def test_break_even_is_the_rate_of_equal_energy(energy: Energy, name: str) -> None:
    """Of counters whose rates are all changed to it, the model costs what the dense one costs."""
    only = replace(energy, profile={name: hardware.profile(name)})
    coded = {s: (v, v * 0.5, m, m * 0.5) for s, (v, _, m, _) in MINI_COUNTERS.items()}
    theirs = account(MINI, only, 3)
    costs = compared(account(MINI, only, 3, counters_of(coded), Costs()), theirs, only)
    for convention, phases in costs.items():
        for phase, found in phases.items():
            even = found[f"breakeven_{name}"]
            if name == "loihi":
                assert even is None and found["saving_loihi"] is None
                continue
            if not even:  # nothing but traffic is left of so small a layer
                assert even == 0.0 and found[f"saving_{name}"] < 0
                continue
            per = {s: (v, v * even, m, m * even) for s, (v, _, m, _) in MINI_COUNTERS.items()}
            again = compared(account(MINI, only, 3, counters_of(per), Costs()), theirs, only)
            assert again[convention][phase][f"saving_{name}"] == pytest.approx(0, abs=1e-9)


def test_break_even_of_operations_is_the_ratio_of_their_prices(energy: Energy) -> None:
    linear = [MINI[0]]
    coded = {"in": MINI_COUNTERS["in"]}
    theirs = account(linear, energy, 3)
    found = compared(account(linear, energy, 3, counters_of(coded), Costs()), theirs, energy)
    cost = found["causal"]["prefill"]
    assert cost["breakeven_45nm"] == pytest.approx(4.6 / 0.9)
    assert cost["breakeven_45nm_int8"] == pytest.approx(3)
    assert cost["breakeven_45nm_fp16"] == pytest.approx(3.75)


# Bad files


@pytest.mark.parametrize(
    ("name", "field", "value", "says"),
    [
        ("45nm", "mac", -4.6, "mac=-4.6: give a finite number, 0 or more"),
        ("45nm", "ac", float("inf"), "give a finite number"),
        ("45nm", "unit", "pj", "unit='pj': choose fJ, pJ, nJ"),
        ("45nm", "source", "", "say in which paper"),
        ("loihi", "neurons_per_core", 0, "neurons_per_core=0: give a whole number, 1 or more"),
        ("streamed", "reuse_steps", 1, "reuse_steps=1: give true or false"),
        ("streamed", "weight_bits", 8.5, "weight_bits=8.5: give a whole number"),
        ("lemaire2022", "sram", [[8192, 10], [4096, 5]], "give pairs"),
        ("lemaire2022", "sram", [[8192, -1]], "give pairs"),
        ("lemaire2022", "sram", [[8192]], "give pairs"),
        ("lemaire2022", "sram", [], "give pairs"),
    ],
)
def test_a_bad_price_is_one_line(name: str, field: str, value: Any, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        replace(hardware.profile(name), **{field: value})
    assert name in str(caught.value)


def test_bad_prices_of_integers_are_one_line() -> None:
    with pytest.raises(InputError, match="multiply=-1: give a finite number, 0 or more"):
        Integers(multiply=-1, add=0, accumulator=32)


def test_two_profiles_of_one_name_are_refused(energy: Energy) -> None:
    with pytest.raises(InputError, match="two have one name: 45nm, 45nm"):
        replace(energy, profile={"a": energy.main, "b": energy.main})
    with pytest.raises(InputError, match="energy.profile is empty"):
        replace(energy, profile={})


def test_units_are_units() -> None:
    pico, nano = (
        joules("45nm", dense(), unit="pJ"),
        joules("45nm", dense(), unit="nJ", mac=0.0046),
    )
    assert pico == pytest.approx(nano)
