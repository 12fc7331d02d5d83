"""The stepped neuron and the fast path against the loop, and that the comparison can fail."""

import functools
import inspect
import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.codings.base import Coding, site_params
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.codings.multigrain import Multigrain
from stages.codings.oat import Oat
from stages.codings.one_spike import OneSpike
from stages.codings.phase import Phase
from stages.codings.signed_digit import SignedDigit
from stages.codings.timed import Timed
from stages.codings.ttfs import Ttfs
from stages.neurons import bank, digits, free_slots, ranges, slots, spikes, step
from stages.neurons.spikes import popcount
from tests.codings.reference import (
    SIGNED,
    bfloat16_patterns,
    breakpoints,
    check_equal,
    definition,
    fitted,
    heavy_tailed,
    label,
    reference,
    seen,
    shipped,
    variants,
)

SEVERAL = [  # options that only together make a neuron of their own
    Gated("gated", 5, 3, True, (0, -1, 1), radix=4),
    Gated("gated", 5, 2, True, radix=2**16),
    SignedDigit("signed_digit", 6, 3, True, (0, 1, -1), radix=4),
    SignedDigit("signed_digit", 7, 2, True, radix=8),
    Timed("timed", 8, 3, mu=0.05),
    Timed("timed", 16, 1, mu=0.01, nu=1e-4),
    Timed("free", 16, 2, levels="free"),
    Timed("free", 8, 3, mu=0.05, levels="free"),
]
CODINGS = [variant for coding in shipped().values() for variant in variants(coding)] + SEVERAL
every_coding = pytest.mark.parametrize("coding", CODINGS, ids=label)
sign_and_magnitude = pytest.mark.parametrize(
    "coding", [c for c in CODINGS if not isinstance(c, SIGNED)], ids=label
)
signed = pytest.mark.parametrize("coding", [c for c in CODINGS if isinstance(c, SIGNED)], ids=label)


@functools.cache
def site(coding: Coding) -> dict[str, Tensor]:
    """Parameters of one fitted site whose scale is no power of two."""
    return site_params(fitted(coding), 1)


def test_the_shipped_neurons_are_found() -> None:
    assert {"las", "las_rounded", "phase", "multigrain", "gated"} <= set(shipped())
    assert {"ttfs", "one_spike", "timed"} <= set(shipped())
    assert {c.timesteps for c in CODINGS} == {*range(1, 11)} - {3, 9} | {16, 32, 128}
    assert {c.grains for c in CODINGS if isinstance(c, Gated)} == {1, 2, 3}


def test_the_fitted_bases_are_decoupled() -> None:
    bases = [site(GRAINS)[name] for name in ("base_d", "base_h", "base_theta")]
    assert len(torch.cat(bases).unique()) == 6


def test_a_coding_without_a_loop_fails() -> None:
    class Newer(Las):
        pass

    for of in (reference, definition):
        with pytest.raises(pytest.fail.Exception, match="Newer is a neuron: add its loop"):
            of(Newer("newer", 4, "zero"), {})


@every_coding
def test_the_reference_is_the_scalar_definition(coding: Coding) -> None:
    """Value by value to the bit: next to breakpoints, over all bfloat16 magnitudes, at the ends."""
    p = site(coding)
    edges, patterns = breakpoints(coding, p), bfloat16_patterns().float()
    edges = edges[torch.linspace(0, len(edges) - 1, 200).long()]
    x = torch.cat([edges, patterns[:: len(patterns) // 200], torch.tensor([0.0, torch.inf])])
    one, values = definition(coding, p), seen(coding, x)
    with np.errstate(over="ignore"):
        rows, columns = [one(value) for value in values], reference(coding, p)(values)
    for expected, column in zip(zip(*rows, strict=True), columns, strict=True):
        assert column.tolist() == [number.item() for number in np.array(expected)]
    assert columns[1].dtype == np.float32 == np.array([row[1] for row in rows]).dtype


@every_coding
def test_equals_the_loop_on_every_bfloat16(coding: Coding) -> None:
    x = bfloat16_patterns()
    assert len(x) == 2**16 - 2 * 2**7  # without inf and nan
    check_equal(coding, site(coding), x)


@every_coding
def test_equals_the_loop_around_every_breakpoint(coding: Coding) -> None:
    p = site(coding)
    x = breakpoints(coding, p)
    if isinstance(coding, Las | Gated):  # a base-2 range uses all of its 2^T codes
        assert len(x) >= 8 * (2**coding.timesteps - 1)
    if isinstance(coding, Ttfs | OneSpike):  # and a spike may come at any time
        assert len(x) >= 4 * (coding.timesteps - 1)
    check_equal(coding, p, x)


@every_coding
def test_a_batch_of_sites_equals_the_sites_one_by_one(coding: Coding) -> None:
    p, x = fitted(coding, sites=3), heavy_tailed(3, 500, seed=1)
    value, count = coding.quantise(x, p)
    table = coding.table(p)
    for k in range(3):
        own = site_params(p, k)
        own_value, own_count = coding.quantise(x[k], own)
        assert torch.equal(value[k], own_value)
        assert torch.equal(count[k], own_count)
        assert torch.equal(table[k], coding.table(own))


@sign_and_magnitude
def test_signs_zero_and_infinity(coding: Coding) -> None:
    p, x = site(coding), heavy_tailed(2, 500, seed=2)[1]
    value, count = coding.quantise(x, p)
    mirrored, mirrored_count = coding.quantise(-x, p)
    assert torch.equal(mirrored, -value) and torch.equal(mirrored_count, count)
    zero, silent = coding.quantise(torch.tensor([0.0, -0.0]), p)
    assert torch.equal(zero, torch.zeros(2)) and torch.equal(silent, torch.zeros(2))
    largest = torch.finfo(torch.float32).max
    edge, _ = coding.quantise(torch.tensor([torch.inf, largest, -largest, -torch.inf]), p)
    assert edge.isfinite().all()
    assert edge[0] == edge[1] == -edge[2] == -edge[3] > 0


@signed
def test_an_interval_codes_zero_within_half_a_step_and_infinity_by_its_ends(coding: Coding) -> None:
    p = site(coding)
    table = coding.table(p)[: coding.timesteps].unique()
    zero, count = coding.quantise(torch.tensor([0.0, -0.0]), p)
    assert bool((zero.abs() <= table.diff().max() / 2 * (1 + 1e-6)).all()) and zero[0] == zero[1]
    assert count.tolist() == [0.0 if coding.silent_zero else 1.0] * 2
    largest = torch.finfo(torch.float32).max
    edge, _ = coding.quantise(torch.tensor([torch.inf, largest, -largest, -torch.inf]), p)
    assert edge.tolist() == [table[-1], table[-1], table[0], table[0]]


def test_the_population_count_is_that_of_python() -> None:
    codes = torch.arange(2**16)
    expected = [code.bit_count() for code in range(2**16)]
    assert popcount(codes.float()).tolist() == expected


# --- each check fails when what it guards is broken -----------------------------------------------

LAS, ROUNDED = Las("las", 6, "zero"), Las("las", 6, "half_step")
GATED, OFFSET = Gated("gated", 4, 3), Gated("gated", 4, 3, offset=True)
LONGER, SIGNED = Gated("gated", 4, 2, grain_steps=(-1, 1)), SignedDigit("signed_digit", 5, 2)
DIGITS, SIGNED_DIGITS = SEVERAL[0], SEVERAL[3]
TIMED, FREE = SEVERAL[4], SEVERAL[7]
OUTLIERS = Oat("oat_rounded", 4, "half_step", 90.0)
GRAINS = Multigrain("multigrain", 6, 2, "half_step", False)
TWO = Phase("phase", 6, 1, "half_step", True, 2)

MODULES = (spikes, step, bank, digits, ranges)
OF_TIME = {TIMED: (spikes, slots), FREE: (spikes, free_slots)}
BREAKS = [
    (LAS, "bank_encode", "v >= 2.0**-t", "v > 2.0**-t"),
    (LAS, "bank_encode", "range(1, timesteps + 1)", "range(timesteps, 0, -1)"),
    (LAS, "bank_encode", "v - 2.0**-t", "v - 2.0 ** -(t + 1)"),
    (LAS, "bank_quantise", "torch.floor(", "torch.round("),
    (LAS, "bank_quantise", "max=steps - 1", "max=steps"),
    (LAS, "bank_quantise", "torch.sign(x).float()", "1"),
    (ROUNDED, "bank_encode", "+ v0", "+ 2 * v0"),
    (ROUNDED, "bank_quantise", "+ v0", "+ 2 * v0"),
    (ROUNDED, "bank_quantise", "+ v0", ""),
    (ROUNDED, "bank_quantise", "magnitude / scale", "magnitude / (2 * scale)"),
    (ROUNDED, "bank_quantise", "(1 / steps) * scale", "(1 / steps) * (2 * scale)"),
    (ROUNDED, "bank_table", "2.0**-timesteps", "2.0 ** -(timesteps + 1)"),
    (ROUNDED, "popcount", ">> 24).to(torch.float32)", ">> 24).to(torch.float32) + 1"),
    (ROUNDED, "popcount", "0x55555555", "0x55555554"),
    (ROUNDED, "decode", "spikes.sign.to(table.dtype)", "1"),
    (OUTLIERS, "bank_encode", ">= limits", "> limits"),
    (OUTLIERS, "bank_encode", "* (1 - v0)", ""),
    (OUTLIERS, "bank_quantise", "candidate * (1 - v0)", "candidate"),
    (OUTLIERS, "bank_quantise", "magnitude < candidate", "magnitude <= candidate"),
    (OUTLIERS, "bank_quantise", "range(grains - 2, -1, -1)", "range(grains - 2, 0, -1)"),
    (GATED, "Bank", "magnitude < limit", "magnitude <= limit"),
    (GATED, "Bank", "(1 - 0.5 / steps)", "1"),
    (GATED, "Bank", "range(last - 1, -1, -1)", "range(0, last)"),
    (GATED, "Bank", "float(k)", "float(last - k)"),
    (GATED, "encode", "v + 0.5 / steps", "v"),
    (GATED, "encode", "(v >= 2.0**-t)", "(v > 2.0**-t)"),
    (GATED, "quantise", "u + 0.5 * step", "u"),
    (GATED, "quantise", "steps - 1)", "steps)"),
    (OFFSET, "Bank", "scale - floor", "scale"),
    (OFFSET, "encode", "(magnitude - floor)", "magnitude"),
    (OFFSET, "encode", "train), floor > 0)", "train), floor < 0)"),
    (OFFSET, "quantise", "+ floor)", ")"),
    (OFFSET, "quantise", "count + (floor > 0)", "count"),
    (OFFSET, "table", "+ bank.floor[..., None]", ""),
    (LONGER, "encode", " & (steps * 2.0**-t >= 1)", ""),
    (LONGER, "table", "2.0**-longest\n", "2.0**-timesteps\n"),
    (DIGITS, "encode_digits", "v + 0.5 / steps", "v"),
    (DIGITS, "encode_digits", "(v >= level)", "(v > level)"),
    (DIGITS, "encode_digits", "v - spike * worth", "v"),
    (DIGITS, "encode_digits", "silent & (spike == 0)", "silent"),
    (DIGITS, "encode_digits", "silent | first[index]", "silent"),
    (DIGITS, "DigitSpikes", "self.longest - sum", "sum"),
    (DIGITS, "digits_of", "lower * bits)\n        thresholds", "lower)\n        thresholds"),
    (DIGITS, "nonzero", "+ low | code", "+ low"),
    (DIGITS, "nonzero", "& low) + low", "& low)"),
    (DIGITS, "top_place", "(torch.int32) - 1)", "(torch.int32))"),
    (DIGITS, "_digit_count", "whole & (place - 1)", "whole"),
    (DIGITS, "_digit_count", "bits) + floor", "bits)"),
    (SIGNED_DIGITS, "signed_threshold", "+ 0.5", "+ 0.75"),
    (SIGNED_DIGITS, "signed_threshold", "base - 1 - digit", "base - 1"),
    (SIGNED_DIGITS, "digits_of", "+ (signed and highest and lower > 0)", ""),
    (SIGNED_DIGITS, "encode_digits", "(v < -level)", "(v <= -level)"),
    (SIGNED_DIGITS, "encode_digits", "1 - 1 / steps", "torch.ones_like(v)"),
    (SIGNED_DIGITS, "signed_count", "(base + 1)", "(base - 1)"),
    (SIGNED_DIGITS, "signed_count", "code > rest", "code > 0"),
    (SIGNED_DIGITS, "_digit_count", "top | floor", "top"),
    (SIGNED, "threshold", "(2 / 3)", "(1 / 2)"),
    (SIGNED, "threshold", "+ 0.5)", "+ 0.75)"),
    (SIGNED, "digits", "3 * low", "2 * low"),
    (SIGNED, "digits", "return leading +", "return"),
    (SIGNED, "quantise", ">= 0.5", "> 0.5"),
    (SIGNED, "encode", "(v >= theta)", "(v > theta)"),
    (SIGNED, "encode", "(v < -theta)", "(v <= -theta)"),
    (GRAINS, "step_encode", "v >= theta", "v > theta"),
    (GRAINS, "step_encode", "v - h", "v - theta"),
    (GRAINS, "step_encode", 'zip(p["h"], p["theta"]', 'zip(p["h"].flip(0), p["theta"].flip(0)'),
    (GRAINS, "step_quantise", "v >= p", "v > p"),
    (GRAINS, "step_quantise", '+ p["v0"][..., None]', '+ 2 * p["v0"][..., None]'),
    (GRAINS, "step_quantise", 'spike * p["h"]', 'spike * p["d"]'),
    (GRAINS, "step_quantise", 'spike * p["d"]', 'spike * p["h"]'),
    (GRAINS, "step_quantise", "count + spike", "count + 1"),
    (GRAINS, "step_table", "bits[:, t]", "bits[:, -1 - t]"),
    (GRAINS, "code_bits", "torch.arange(timesteps - 1, -1, -1)", "torch.arange(timesteps)"),
    (TIMED, "falling", "u >= theta", "u > theta"),
    (TIMED, "falling", "thresholds.flip(-1)", "thresholds"),
    (TIMED, "SlotSpikes", "self.timesteps - self.time", "self.time"),
    (TIMED, "encode", "abs() / p", "abs() / 2 / p"),
    (TIMED, "quantise", "fires = u >=", "fires = u >"),
    (TIMED, "quantise", "inside = u >=", "inside = u >"),
    (TIMED, "quantise", ">= 0.5", "> 0.5"),
    (TIMED, "quantise", "gap, end) *", "gap, end + gap) *"),
    (TIMED, "quantise", "torch.where(u <", "torch.where(2 * u <"),
    (TIMED, "thresholds", "/ 2", "/ 2.001"),
    (TIMED, "levels", "index - before + 1", "index - before"),
    (TIMED, "levels", "right=True", "right=False"),
    (TIMED, "_counts", 'torch.isfinite(p["start"])', 'p["start"] >= 0'),
    (FREE, "quantise", "index > 0", "index >= 0"),
    (
        FREE,
        "quantise",
        'p["thresholds"], right=True)\n        level',
        'p["thresholds"])\n        level',
    ),
    (FREE, "number_of_levels", "sum(-1)", "sum(-1) - 1"),
    (TWO, "step_encode", "fired < max_spikes", "fired <= max_spikes"),
    (TWO, "step_quantise", "count < max_spikes", "count <= max_spikes"),
]


def broken(module: ModuleType, name: str, old: str, new: str) -> object:
    """The function or class of a module with one piece of its source replaced."""
    source = re.sub('"""(?s:.*?)"""', "...", inspect.getsource(getattr(module, name)))
    assert source.count(old) == 1, f"{old!r} is no longer one place of {name}: update the mutation"
    scope = dict(vars(module))
    exec(source.replace(old, new), scope)
    return scope[name]


def _defines(module: ModuleType, name: str) -> bool:
    return getattr(vars(module).get(name), "__module__", None) == module.__name__


@pytest.mark.parametrize(("coding", "name", "old", "new"), BREAKS)
def test_the_comparison_fails_on_a_broken_neuron(
    coding: Coding, name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = site(coding)
    beyond = 2 * coding.table(p).max() * torch.tensor([1.0, -1.0])
    x = torch.cat([breakpoints(coding, p), heavy_tailed(2, 300)[1], beyond])
    check_equal(coding, p, x)
    module = next(each for each in OF_TIME.get(coding, MODULES) if _defines(each, name))
    whole, part = vars(module)[name], broken(module, name, old, new)
    for user in [m for n, m in sys.modules.items() if n.startswith(("stages.", "tests."))]:
        if vars(user).get(name) is whole:
            monkeypatch.setattr(user, name, part)
    with pytest.raises(AssertionError):
        check_equal(coding, p, x)


def test_the_comparison_fails_on_a_doubled_scale() -> None:
    p = site(GRAINS)
    wrong = p | {"scale": 2 * p["scale"]}
    x = heavy_tailed(2, 300)[1]
    expected = reference(GRAINS, p)
    values = torch.from_numpy(expected(x.abs().numpy())[1])
    assert torch.equal(GRAINS.quantise(x, p)[0].abs(), values)
    assert not torch.equal(GRAINS.quantise(x, wrong)[0].abs(), values)


def test_the_batch_comparison_fails_on_swapped_sites() -> None:
    p, x = fitted(GATED, sites=2), heavy_tailed(2, 300)
    swapped = {name: value.flip(0) for name, value in p.items()}
    assert not torch.equal(GATED.quantise(x, swapped)[0], GATED.quantise(x, p)[0])
