"""Energy: published totals, PyTorch's own count of operations, the counters, and hand-made sums."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.store.step import Step
from stages.analysis.operations import ELEMENTWISE, Amount, Operation, operations
from stages.codings.las import Las
from stages.energy import WEIGHED, account, by_kind, compared, summary
from stages.errors import InputError
from stages.model.loading import meta_model
from stages.model.sites import find_sites
from stages.ports.counters import Counters, SiteCounter
from stages.ports.hooks import attached
from stages.ports.port import DensePort, SpikingPort
from stages.transforms.prefix import attach_prefix

CONF = Path(__file__).parents[2] / "conf"
TINY = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not hidden / heads
}
TOKENS = 11


@dataclass(frozen=True)
class Costs:
    """What the energy asks of a coding."""

    value_macs: int = 0
    neuron: bool = True
    operand_bits: int | None = None
    weight_bits: int | None = None


def tiny(model_type: str = "llama", **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TINY, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def plan_of(model: PreTrainedModel) -> list[Operation]:
    return operations(model, find_sites(model))


def part(frame: pd.DataFrame, convention: str, phase: str = "prefill") -> pd.DataFrame:
    return frame[(frame["convention"] == convention) & (frame["phase"] == phase)]


def counters_of(
    rows: dict[str, tuple[float, float, float, float]],
    macs: float = 0,
    acs: float = 0,
    gate: int = 0,
    steps: int = 4,
) -> pd.DataFrame:
    """A counter table of {site: (values, spikes, macs, acs)}, all of whose codes cost the same."""
    frame = pd.DataFrame.from_dict(rows, "index", columns=["values", "spikes", "macs", "acs"])
    frame = frame.assign(decode_macs=macs, decode_acs=acs, comparisons=gate, steps=steps)
    return frame.rename_axis("site").reset_index()


# Dense: published dimensions and independent counts


def test_llama3_8b_at_512_tokens_is_the_published_total(energy):
    dims = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "llama3-8b.yaml").dims)
    frame = account(plan_of(meta_model(dims)), energy, 512)
    macs = part(frame, "paper").groupby("kind")["macs"].sum()
    # 32 layers of q, o (4096 x 4096), k, v (4096 x 1024) and three 4096 x 14336; then the head.
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert macs["linear"] == 512 * (32 * layer + 4096 * 128256)
    assert round(macs["linear"] / 1e9, 3) == 3842.385
    assert macs["qk"] + macs["pv"] == 2 * 32 * 512 * 512 * 4096
    assert round((macs["qk"] + macs["pv"]) / 1e9, 3) == 68.719
    assert macs[list(ELEMENTWISE)].sum() / 1e9 == pytest.approx(0.975, abs=0.01)
    total = {name: round(value, 2) for name, value in summary(frame)["paper"]["prefill"].items()}
    assert total == {"macs_G": 3912.08, "acs_G": 0.17, "energy_J": 18.00}


def test_products_are_those_that_pytorch_counts(energy):
    model = tiny()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.arange(TOKENS)[None])
    counts = {n: sum(c.values()) / 2 for n, c in counter.get_flop_counts().items()}
    frame = part(account(plan_of(model), energy, TOKENS), "paper")
    macs = frame.set_index("op")["macs"]
    linear = frame[frame["kind"] == "linear"]["op"]
    assert len(linear) == 2 * 7 + 1
    assert {op: macs[op] for op in linear} == {
        op: counts[f"LlamaForCausalLM.{op}"] for op in linear
    }
    for path in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        projections = sum(macs[f"{path}.{name}_proj"] for name in "qkvo")
        products = macs[f"{path}:qk"] + macs[f"{path}:pv"]
        assert products == counts[f"LlamaForCausalLM.{path}"] - projections


def test_elementwise_operations_have_their_number_of_elements(energy):
    model = tiny()
    frame = part(account(plan_of(model), energy, TOKENS), "causal")
    elements = dict.fromkeys(ELEMENTWISE, 0)
    elements["norm"] = 5 * 24
    elements["rope"] = 2 * (4 + 2) * 8
    elements["activation"] = elements["product"] = 2 * 52
    elements["residual"] = 4 * 24
    per_token = {kind: TOKENS * count for kind, count in elements.items()}
    per_token["softmax"] = 2 * 4 * TOKENS * (TOKENS + 1) // 2
    macs = {"norm": 2, "rope": 2, "softmax": 3, "activation": 2, "product": 1, "residual": 0}
    acs = {"norm": 0, "rope": 1, "softmax": 0, "activation": 0, "product": 0, "residual": 1}
    sums = frame.groupby("kind")[["macs", "acs"]].sum()
    assert {k: sums["macs"][k] for k in ELEMENTWISE} == {k: macs[k] * per_token[k] for k in macs}
    assert {k: sums["acs"][k] for k in ELEMENTWISE} == {k: acs[k] * per_token[k] for k in acs}


@pytest.mark.parametrize("window", [None, 4])
def test_decoding_token_by_token_costs_what_the_causal_prefill_costs(energy, window):
    model = tiny() if window is None else tiny("mistral", sliding_window=window)
    plan = plan_of(model)
    prefill = part(account(plan, energy, TOKENS), "causal")[["macs", "acs", "energy_J"]]
    steps = [part(account(plan, energy, t), "causal", "decode") for t in range(1, TOKENS + 1)]
    decoded = sum(step[["macs", "acs", "energy_J"]].to_numpy() for step in steps)
    assert decoded == pytest.approx(prefill.to_numpy(), rel=1e-12)
    assert part(account(plan, energy, TOKENS), "paper")["macs"].sum() > prefill["macs"].sum()


def test_dense_saves_nothing_and_totals_are_the_sums_of_the_kinds(energy):
    plan = plan_of(tiny())
    dense = account(plan, energy, TOKENS)
    for phases in compared(dense, dense, energy).values():
        assert [costs["saving"] for costs in phases.values()] == [0.0, 0.0]
    kinds = by_kind(dense)
    assert not {"gate", "decode_scaling"} & set(kinds["kind"])
    for (convention, phase), rows in kinds.groupby(["convention", "phase"]):
        totals = summary(dense)[convention][phase]
        assert rows["count"].sum() == len([op for op in plan if op.kind != "gate"])
        assert {name: rows[name].sum() for name in totals} == pytest.approx(totals)


# Spiking: the counters of a real forward pass, and sums made by hand


@pytest.mark.parametrize(
    ("window", "prefix"), [(None, ()), (None, (3, 5)), (4, ()), (TOKENS + 2, (3, 5))]
)
def test_dense_counters_agree_with_the_plan(energy, window, prefix):
    """What the sites count in a forward pass is what the plan says of them."""
    model = tiny() if window is None else tiny("mistral", sliding_window=window)
    if prefix:
        attach_prefix(model, prefix)
    sites = find_sites(model)
    counters = Counters(sites, "cpu")
    ports = {s.name: DensePort(SiteCounter(counters, i)) for i, s in enumerate(sites)}
    with attached(model, sites, ports), torch.no_grad():
        model(torch.arange(TOKENS)[None])
    counted = counters.frame(set()).set_index("site")
    plan = plan_of(model)
    macs = part(account(plan, energy, TOKENS), "causal").set_index("op")["macs"]
    entered = {
        site: sum(macs[op.name] for op in plan if op.kind != "gate" and site in op.operands)
        for site in counted.index
    }
    assert entered == counted["macs"].to_dict()
    coded = counters_of(dict.fromkeys(counted.index, (1, 1, 1, 1)), gate=1)
    gated = account(plan, energy, TOKENS, coded, Costs())
    gates = part(gated, "causal").query("kind == 'gate'").set_index("op")["acs"]
    assert gates.to_dict() == counted["values"].to_dict()


def test_spikes_counted_in_one_window_are_its_additions(energy):
    model = tiny()
    sites = find_sites(model)
    counters = Counters(sites, "cpu")
    las = Las("las", timesteps=3, v0="zero")
    ports = {
        site.name: SpikingPort(las, {"scale": torch.tensor([1.0])}, SiteCounter(counters, index))
        for index, site in enumerate(sites)
    }
    with attached(model, sites, ports), torch.no_grad():
        model(torch.arange(TOKENS)[None])
    counted = counters.frame({site.name for site in sites})
    counted = counted.assign(decode_macs=1, decode_acs=0, comparisons=0, steps=3)
    frame = part(account(plan_of(model), energy, TOKENS, counted, las), "causal")
    products = frame[frame["kind"].isin(["linear", "qk", "pv"])]
    assert counted["acs"].sum() > 0
    assert products["macs"].sum() == 0
    assert products["acs"].sum() == pytest.approx(counted["acs"].sum(), rel=1e-12)
    elementwise = frame[frame["kind"] == "product"]["macs"].sum()
    assert elementwise == 2 * 52 * TOKENS  # activation x up stays a product


# Two tokens of context three: causal pairs 1 + 2 + 3 = 6, the full square 9.
MINI = [
    Operation("proj", "linear", 0, Amount(10), ("in",), Amount(5)),
    Operation("attn:qk", "qk", 0, Amount(per_pair=4), ("q", "k"), Amount(per_pair=2)),
    Operation("attn:pv", "pv", 0, Amount(per_pair=4), ("probs", "v"), Amount(4)),
    Operation("norm", "norm", 0, Amount(7)),
    Operation("in", "gate", 0, Amount(2), ("in",)),
    Operation("probs", "gate", 0, Amount(per_pair=2), ("probs",)),
    Operation("up", "gate", 0, Amount(3), ("up",)),
]
MINI_COUNTERS = {  # site: values, spikes, macs, acs
    "in": (8, 4, 40, 20),  # 0.5 a value
    "q": (10, 5, 100, 60),  # 0.5 a value, 0.6 weighted
    "k": (10, 2, 100, 30),  # 0.2, 0.3
    "probs": (20, 8, 80, 32),  # 0.4, 0.4
    "v": (10, math.nan, 100, math.nan),  # dense
    "up": (9, 9, 0, 0),  # enters no matmul
}


def cells(frame: pd.DataFrame, convention: str, phase: str) -> dict[tuple[str, str], tuple]:
    rows = part(frame, convention, phase)
    return {(r.op, r.kind): (r.macs, pytest.approx(r.acs)) for r in rows.itertuples()}


def test_hand_made_example(energy):
    frame = account(MINI, energy, 3, counters_of(MINI_COUNTERS, 2, 7, 3), Costs())
    assert cells(frame, "paper", "prefill") == {
        ("proj", "linear"): (0, 30 * 0.5),
        ("attn:qk", "qk"): (0, 36 * 0.5),
        ("attn:pv", "pv"): (0, 36 * 0.4),
        ("norm", "norm"): (42, 0),
    }
    assert cells(frame, "paper", "decode")["attn:qk", "qk"] == (0, 12 * 0.5)
    assert cells(frame, "causal", "prefill") == {
        ("proj", "linear"): (0, 30 * 0.5),
        ("proj", "decode_scaling"): (15 * 2, 15 * 7),
        ("attn:qk", "qk"): (0, 24 * (0.6 + 0.3)),
        ("attn:qk", "decode_scaling"): (12 * 2 * 2, 12 * 2 * 7),
        ("attn:pv", "pv"): (0, 24 * 0.4),  # v is dense
        ("attn:pv", "decode_scaling"): (12 * 2, 12 * 7),
        ("norm", "norm"): (42, 0),
        ("in", "gate"): (0, 6 * 3),
        ("probs", "gate"): (0, 12 * 3),
        ("up", "gate"): (0, 9 * 3),
    }
    assert cells(frame, "causal", "decode")["probs", "gate"] == (0, 3 * 2 * 3)
    macs, acs = 30 + 48 + 24 + 42, 15 + 21.6 + 9.6 + 18 + 36 + 27 + 105 + 168 + 84
    joules = summary(frame)["causal"]["prefill"]["energy_J"]
    assert joules == pytest.approx((4.6 * macs + 0.9 * acs) * 1e-12)
    dense = account(MINI, energy, 3)
    assert compared(frame, dense, energy)["causal"]["prefill"]["saving"] == pytest.approx(
        1 - (4.6 * macs + 0.9 * acs) / (4.6 * (30 + 24 + 24 + 42))
    )


def test_products_without_a_coded_operand_stay_multiplications(energy):
    silent = {s: (v, math.nan, m, math.nan) for s, (v, _, m, _) in MINI_COUNTERS.items()}
    coding = Costs()
    dense = account(MINI, energy, 3)
    coded = account(MINI, energy, 3, counters_of(silent, 2, 7, 3), coding)
    pd.testing.assert_frame_equal(coded, dense)
    pd.testing.assert_frame_equal(account(MINI, energy, 3, counters_of(silent)), dense)
    only_k = counters_of(silent | {"k": MINI_COUNTERS["k"]})
    frame = account(MINI, energy, 3, only_k, coding)
    assert cells(frame, "paper", "prefill")["attn:qk", "qk"] == (0, 36 * 0.2)
    assert cells(frame, "causal", "prefill")["attn:qk", "qk"] == (0, 24 * 0.3)
    assert cells(frame, "causal", "prefill")["attn:pv", "pv"] == (24, 0)


def test_energy_of_a_bound_is_undefined_not_zero(energy):
    counters = counters_of(MINI_COUNTERS).assign(spikes=math.nan, acs=math.nan)
    frame = account(MINI, energy, 3, counters, Costs(neuron=False))
    undefined = {"macs_G": None, "acs_G": None, "energy_J": None}
    assert summary(frame)["causal"] == {"prefill": undefined, "decode": undefined}
    costs = compared(frame, account(MINI, energy, 3), energy)["paper"]["prefill"]
    assert costs["saving"] is None and costs["breakeven_45nm"] is None
    assert part(frame, "paper").query("kind == 'norm'")["energy_J"].notna().all()
    assert by_kind(frame).query("kind == 'qk'")["energy_J"].isna().all()


def test_what_decoding_costs_is_that_of_the_site(energy):
    """Experts of a layer together, by the values that pass each; one is dense."""
    plan = [Operation("down", "linear", 0, Amount(10), ("m:down[*]",), Amount(5))]
    plan += [Operation("m:down[*]", "gate", 0, Amount(8), ("m:down[*]",))]
    rows = {
        "m:down[0]": (6, 3, 60, 30),
        "m:down[1]": (2, 1, 20, 10),
        "m:down[2]": (2, None, 20, None),
    }
    counters = counters_of(rows).assign(
        decode_macs=[2, 4, math.nan], decode_acs=[8, 0, math.nan], comparisons=[1, 3, math.nan]
    )
    found = cells(account(plan, energy, 3, counters, Costs()), "causal", "prefill")
    assert found["down", "decode_scaling"] == (
        pytest.approx(15 * (6 * 2 + 2 * 4) / 10),
        15 * 6 * 8 / 10,
    )
    assert found["m:down[*]", "gate"] == (0, 24 * (6 * 1 + 2 * 3) / 10)


def test_counters_that_do_not_say_what_decoding_costs_are_refused(energy):
    with pytest.raises(ValueError, match="without decode_macs, decode_acs, comparisons, steps"):
        account(MINI, energy, 3, counters_of(MINI_COUNTERS).drop(columns="decode_acs"), Costs())


def test_the_fields_of_the_stage_make_a_key(energy):
    step = Step("energy", energy, {}, ("stages.energy",))
    costlier = replace(energy, profile={"nm45": replace(energy.main, ac=1.0)})
    assert len({step.key(), replace(step, spec=costlier).key()}) == 2


# Bad input


def test_spikes_without_a_coding_are_refused(energy):
    with pytest.raises(ValueError, match="no coding"):
        account(MINI, energy, 3, counters_of(MINI_COUNTERS))


@pytest.mark.parametrize("tokens", [0, -3, 1.5])
def test_tokens_are_a_positive_whole_number(energy, tokens):
    with pytest.raises(InputError, match="energy.tokens"):
        account(MINI, energy, tokens)
    with pytest.raises(InputError, match="energy.tokens"):
        replace(energy, tokens=tokens)


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "half"},
        {"operands": "two"},
        {"macs": {"norm": 2}},
        {"acs": dict.fromkeys(ELEMENTWISE, 1)},  # without those of a rotation
        {"acs": dict.fromkeys(WEIGHED, -1)},
    ],
)
def test_a_convention_says_what_is_allowed(energy, change):
    with pytest.raises(InputError, match=next(iter(change))):
        replace(energy.conventions["paper"], **change)
