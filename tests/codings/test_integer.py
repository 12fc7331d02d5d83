"""Integers against scalar loops, published spacings and exhaustive search, and inside a model."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

import stages
from stages.analysis.footprint import parameter_bytes
from stages.analysis.operations import PRODUCTS, operations
from stages.codings.base import site_params, squared_error
from stages.codings.integer import Integer
from stages.energy import Energy, account, compared, summary
from stages.errors import InputError
from stages.evaluation import perplexity
from stages.fitted import Conversion
from stages.model.sites import find_sites
from stages.patching import Patching
from stages.ports.kernels import softmax_kernel
from stages.ports.patched import patched
from tests.codings.reference import atoms_of, bfloat16_patterns, heavy_tailed
from tests.ports.biases import bias

TENSOR = Integer(bits=4, per="tensor", scale="maximum")
TOKEN = Integer(bits=4)
Converts = Callable[..., Conversion]
Draws = Callable[..., Tensor]


def fitted(coding: Integer, x: Tensor) -> dict[str, Tensor]:
    """Parameters of all sites, fitted to their values [sites, K], as they are kept."""
    smallest, largest = x.double().amin(-1), x.double().amax(-1)
    atoms = replace(atoms_of(x), extremes=torch.stack([smallest, largest], -1))
    return {name: value.float() for name, value in coding.fit(atoms).params.items()}


def by_hand(values: np.ndarray, scale: float, lowest: int, highest: int) -> list[float]:
    """One value at a time in float32: the nearest integer, of two the even one, within the range."""
    step = np.float32(scale) / np.float32(highest)
    codes: list[int] = []
    for x in values.astype(np.float32):
        with np.errstate(over="ignore"):
            code = round(float(np.clip(x / step, lowest - 1, highest + 1)))
        codes.append(min(max(code, lowest), highest))
    return [float(np.float32(code) * step) for code in codes]


def near_breakpoints(scale: float, highest: int) -> np.ndarray:
    """Every half step and two float32 to either side of it, of both signs."""
    half = (np.arange(highest + 2) + 0.5) * scale / highest
    bits = half.astype(np.float32).view(np.int32)[:, None] + np.arange(-2, 3, dtype=np.int32)
    x = bits.ravel().view(np.float32)
    return np.concatenate([x, -x])


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 11])
@pytest.mark.parametrize("scale", ["maximum", "least_error"])
def test_equals_the_loop_over_values(bits: int, scale: str) -> None:
    coding = Integer(bits=bits, per="tensor", scale=scale)
    p = fitted(coding, heavy_tailed(2, 300))
    top = 2 ** (bits - 1) - 1
    for site in range(2):
        own = site_params(p, site)
        edges = torch.from_numpy(near_breakpoints(float(own["scale"]), top))
        extreme = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-42])
        x = torch.cat([edges, extreme, bfloat16_patterns()[site::97].float()])
        value, count = coding.quantise(x, own)
        assert value.tolist() == by_hand(x.numpy(), float(own["scale"]), -top, top)
        assert count.isnan().all() and count.shape == x.shape
        assert set(value.abs().tolist()) == set(coding.table(own)[: top + 1].tolist())
        short = x.bfloat16()
        assert torch.equal(coding.quantise(short, own)[0], coding.quantise(short.float(), own)[0])


def test_all_sites_at_once_are_the_sites_one_by_one() -> None:
    x = heavy_tailed(3, 500)
    coding = replace(TENSOR, scale="least_error")
    p = fitted(coding, x)
    value, _ = coding.quantise(x, p)
    for site in range(3):
        alone = fitted(coding, x[site : site + 1])
        assert {k: float(v) for k, v in alone.items()} == {k: float(v[site]) for k, v in p.items()}
        assert torch.equal(coding.quantise(x[site], site_params(p, site))[0], value[site])
        assert torch.equal(coding.table(p)[site], coding.table(site_params(p, site)))


def test_values_worked_out_by_hand() -> None:
    """Three bits are -3 to 3, without a sign 0 to 7; halves round to even, beyond the ends saturates."""
    x = torch.tensor([[3.0, 0.5, -1.5, 2.5, -0.4, 9.0]])
    p = site_params(fitted(replace(TENSOR, bits=3), x[:, :5]), 0)
    assert p["scale"] == 3
    value, _ = replace(TENSOR, bits=3).quantise(x, p)
    assert value.tolist() == [[3, 0, -2, 2, 0, 3]]
    one_sided = replace(TENSOR, bits=3, unsigned=True)
    p = site_params(fitted(one_sided, torch.tensor([[3.5, 0.25, 1.3]])), 0)
    value, _ = one_sided.quantise(torch.tensor([3.5, 0.25, 0.3, 1.3, -1.0, 9.0]), p)
    assert value.tolist() == [3.5, 0, 0.5, 1.5, 0, 3.5]
    signed = site_params(fitted(one_sided, torch.tensor([[3.5, -0.25, 1.3]])), 0)
    assert (float(signed["lowest"]), float(signed["highest"])) == (-3, 3)


def test_a_token_has_the_range_of_its_largest_value() -> None:
    x = torch.tensor([[3.0, 0.5, -1.4], [-300.0, 140.0, 0.0], [0.0, 0.0, 0.0]])
    coding = replace(TOKEN, bits=3)
    p = site_params(fitted(coding, x.view(1, -1)), 0)
    assert coding.quantise(x, p)[0].tolist() == [[3, 0, -1], [-300, 100, 0], [0, 0, 0]]
    assert torch.equal(coding.quantise(x[1:2], p)[0], coding.quantise(x, p)[0][1:2])
    heads = torch.stack([x, 2 * x])[None]  # [B, H, S, D]: a token is one head's vector
    assert torch.equal(coding.quantise(heads, p)[0][0, 1], 2 * coding.quantise(x, p)[0])


# --- fitting --------------------------------------------------------------------------------------


def distortion(x: np.ndarray, clip: float, top: int) -> float:
    step = clip / top
    return float(np.mean((np.clip(np.round(x / step), -top, top) * step - x) ** 2))


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_no_clipping_value_has_less_error(bits: int) -> None:
    x = heavy_tailed(6, 2000, seed=bits)
    coding = Integer(bits=bits, per="tensor", scale="least_error")
    p = fitted(coding, x)
    error = squared_error(coding, atoms_of(x), p)
    top = 2 ** (bits - 1) - 1
    for site, values in enumerate(x.double().numpy()):
        clips = np.abs(values).max() * np.geomspace(2e-3, 1.2, 3000)
        least = min(distortion(values, clip, top) for clip in clips)
        assert distortion(values, float(p["scale"][site]), top) <= least * 1.001
        assert float(error[site]) == pytest.approx(least, rel=2e-3)
        assert distortion(values, 0.8 * float(p["scale"][site]), top) > least * 1.001  # it can fail


@pytest.mark.parametrize(("bits", "spacing", "error"), [(2, 1.224, 0.1902), (3, 0.6508, 0.04687)])
def test_the_gaussian_spacing_of_max(bits: int, spacing: float, error: float) -> None:
    """Max 1960, table II: evenly spaced outputs of a unit Gaussian, an odd number of them."""
    middle = (np.arange(20_000) + 0.5) / 20_000
    atoms = atoms_of(torch.from_numpy(stats.halfnorm.ppf(middle))[None])
    coding = Integer(bits=bits, per="tensor", scale="least_error")
    p = {name: value.float() for name, value in coding.fit(atoms).params.items()}
    assert float(p["scale"] / p["highest"]) == pytest.approx(spacing, rel=5e-3)
    assert float(squared_error(coding, atoms, p)) == pytest.approx(error, rel=5e-3)


def test_the_largest_value_of_calibration_is_a_level() -> None:
    x = heavy_tailed(4, 1000)
    p = fitted(TENSOR, x)
    assert torch.equal(p["scale"], x.abs().amax(-1))
    error = squared_error(TENSOR, atoms_of(x), p)
    least = replace(TENSOR, scale="least_error")
    assert bool((squared_error(least, atoms_of(x), fitted(least, x)) < error / 1.05).all())


@pytest.mark.parametrize("scale", ["maximum", "least_error"])
@pytest.mark.parametrize("per", ["tensor", "token"])
def test_a_site_of_zeros_stays_zero(scale: str, per: str) -> None:
    coding, x = Integer(per=per, scale=scale), torch.zeros(1, 8)
    assert torch.equal(coding.quantise(x, fitted(coding, x))[0], x)


def test_sites_of_one_sign_have_twice_the_integers_if_asked() -> None:
    x = torch.cat([heavy_tailed(1, 1000).abs(), heavy_tailed(1, 1000)])
    coding = replace(TENSOR, bits=6, scale="least_error")
    signed, unsigned = fitted(coding, x), fitted(replace(coding, unsigned=True), x)
    assert signed["lowest"].tolist() == [-31, -31] and unsigned["lowest"].tolist() == [0, -31]
    assert unsigned["highest"].tolist() == [63, 31]
    errors = [(coding.quantise(x, p)[0] - x).square().mean(-1) for p in (signed, unsigned)]
    assert float(errors[1][0]) < 0.5 * float(errors[0][0]) and errors[0][1] == errors[1][1]


# --- what it says of itself ------------------------------------------------------------------------


def test_it_has_bits_and_no_spikes() -> None:
    assert (TENSOR.bits, TENSOR.timesteps, TENSOR.operand_bits, TENSOR.weight_bits) == (4, 4, 4, 8)
    assert not TENSOR.neuron and TENSOR.converts and not TENSOR.trained
    assert not TENSOR.tokenwise and TENSOR.shares_levels
    assert TOKEN.tokenwise and not TOKEN.shares_levels
    with pytest.raises(NotImplementedError, match="no spike train"):
        TENSOR.encode(torch.ones(1), {})
    others = (stages.Dense(), stages.Las(), stages.LloydMax(), stages.Gif())
    assert all(each.operand_bits is None and each.weight_bits is None for each in others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, r"coding\.bits=1 for integer: give a whole number from 2 to 16"),
        ({"bits": 17}, r"coding\.bits=17"),
        ({"bits": 4.5}, r"coding\.bits=4\.5"),
        ({"weight_bits": 0}, r"coding\.weight_bits=0"),
        ({"per": "channel"}, r"coding\.per='channel' for integer: choose tensor or token"),
        ({"scale": "mean"}, r"coding\.scale='mean' for integer: choose maximum or least_error"),
    ],
)
def test_what_it_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        replace(TENSOR, **change)
    assert "\n" not in str(error.value)


# --- in a model -----------------------------------------------------------------------------------


def test_values_alone_keep_the_scale_of_their_site(
    model: PreTrainedModel, convert: Converts
) -> None:
    """Their product sums over tokens; every other operand's scale leaves the sum."""
    neurons = convert(model, TOKEN).neurons
    token = dict(zip(neurons.roles, neurons.fit.params["token"].tolist(), strict=True))
    assert set(token) == {site.role for site in find_sites(model)}
    assert {role for role, dynamic in token.items() if not dynamic} == {"attn.v"}
    assert "token" not in convert(model, TENSOR).neurons.fit.params


@pytest.mark.parametrize("coding", [TENSOR, TOKEN], ids=["tensor", "token"])
def test_live_error_falls_by_four_a_bit_and_no_spikes_are_counted(
    model: PreTrainedModel, tokens: Draws, convert: Converts, coding: Integer
) -> None:
    errors = []
    for bits in (6, 9):
        conversion = convert(model, replace(coding, bits=bits))
        frame = Patching(2).run(model, tokens(2, 20), conversion, 2)
        assert frame["spikes"].isna().all() and len(frame) == len(find_sites(model))
        assert frame["nmse_atoms"].isna().all() == coding.tokenwise
        errors.append(frame["nmse"])
    assert 4**2.5 < float((errors[0] / errors[1]).median()) < 4**3.5


@pytest.mark.parametrize("per", ["tensor", "token"])
def test_many_bits_are_the_dense_model(
    model: PreTrainedModel, tokens: Draws, convert: Converts, per: str
) -> None:
    ids = tokens(2, 20)
    dense = perplexity(model, ids, None, 2, "tiny").metrics["perplexity"]
    found = {
        bits: perplexity(model, ids, convert(model, Integer(bits=bits, per=per)), 2, "tiny")
        for bits in (2, 14)
    }
    assert found[14].metrics["perplexity"] == pytest.approx(dense, rel=1e-2)
    assert abs(found[2].metrics["perplexity"] / dense - 1) > 0.05


def test_later_tokens_change_no_earlier_logits(
    model: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    ids = tokens(1, 12)
    other = ids.clone()
    other[:, 8:] = tokens(1, 4, seed=9)
    with torch.no_grad(), patched(model, convert(model, TOKEN)):
        one, two = model(ids).logits, model(other).logits
    assert torch.equal(one[:, :8], two[:, :8]) and not torch.equal(one[:, 8:], two[:, 8:])


@pytest.mark.parametrize("per", ["tensor", "token"])
def test_its_products_are_those_of_the_dense_model(
    model: PreTrainedModel, tokens: Draws, convert: Converts, energy: Energy, per: str
) -> None:
    conversion = convert(model, Integer(bits=8, per=per))
    counters = perplexity(model, tokens(2, 9), conversion, 2, "tiny").counters
    assert counters["spikes"].isna().all() and counters["acs"].isna().all()
    plan = operations(model, find_sites(model))
    dense = account(plan, energy, 9)
    frame = account(plan, energy, 9, counters, conversion.coding)
    products = frame[frame["kind"].isin(PRODUCTS)].reset_index(drop=True)
    theirs = dense[dense["kind"].isin(PRODUCTS)].reset_index(drop=True)
    assert products[["op", "macs", "acs"]].equals(theirs[["op", "macs", "acs"]])
    assert set(products["operand_bits"]) == {8.0} and not products["dense"].any()
    assert set(products.groupby("kind")["weight_bits"].first()) == {8.0}
    causal = frame[(frame["convention"] == "causal") & (frame["phase"] == "prefill")]
    sums = causal.groupby("kind")[["macs", "acs", "outputs"]].sum()
    # a scale for each operand of every accumulator, and of a token the comparisons for its largest
    pairs = sums.loc["qk", "outputs"] + sums.loc["pv", "outputs"]
    assert sums.loc["decode_scaling", "macs"] == sums.loc["linear", "outputs"] + 2 * pairs
    assert ("gate" in sums.index) == (per == "token")
    integers = compared(frame, dense, energy)["causal"]["prefill"]
    assert products["energy_J"].to_numpy() == pytest.approx(0.3e-12 * products["macs"].to_numpy())
    assert 0 < integers["saving_45nm"] < 1 - 0.3 / 4.6 and integers["breakeven_45nm"] is None
    bound = convert(model, stages.LloydMax(timesteps=4))
    without = summary(account(plan, energy, 9, counters, bound.coding))
    assert without["causal"]["prefill"]["energy_J"] is None  # a bound's are undefined


@pytest.mark.parametrize("per", ["tensor", "token"])
def test_a_saved_model_has_the_same_logits_to_the_bit(
    tiny: Callable[..., PreTrainedModel], tokens: Draws, tmp_path: Path, per: str
) -> None:
    model = tiny(attention="sdpa")
    stages.convert(model, tokens(4, 16), Integer(bits=8, weight_bits=4, per=per), length=16)
    with torch.no_grad():
        before = model(tokens(2, 9)).logits
    stages.save(model, tmp_path / "integers")
    loaded = stages.load(str(tmp_path / "integers"))
    assert stages.conversion(loaded).coding == Integer(bits=8, weight_bits=4, per=per)
    with torch.no_grad():
        assert torch.equal(loaded(tokens(2, 9)).logits, before)


def test_probabilities_have_the_range_of_their_query() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(1, 2, 5, 5, generator=generator)
    mask = torch.ones(5, 5).tril().bool()[None, None]
    p = {"scale": torch.tensor(1.0), "lowest": torch.tensor(-7.0), "highest": torch.tensor(7.0)}
    value, _ = softmax_kernel(TOKEN, False)(
        scores.clone(), 1.0, bias(mask), p | {"token": torch.tensor(1.0)}
    )
    exact = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    largest = exact.amax(-1, keepdim=True)
    assert torch.equal(value == 0, (exact / largest * 7).round() == 0)
    torch.testing.assert_close(value, (exact / largest * 7).round() * largest / 7)
    fixed, _ = softmax_kernel(TOKEN, False)(
        scores.clone(), 1.0, bias(mask), p | {"token": torch.tensor(0.0)}
    )
    torch.testing.assert_close(fixed, (exact * 7).round() / 7)


def test_the_footprint_needs_no_model() -> None:
    assert (parameter_bytes(TENSOR), parameter_bytes(TOKEN)) == (12, 16)
