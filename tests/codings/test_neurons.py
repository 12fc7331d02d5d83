"""The stepped neuron and the fast path against the scalar loop, and that the comparison can fail."""

import functools
import inspect
import re

import pytest
import torch
from reference import (
    around_breakpoints,
    bfloat16_patterns,
    check_equal,
    fitted,
    heavy_tailed,
    label,
    reference,
    shipped,
    variants,
)
from torch import Tensor

from stages.codings import neurons
from stages.codings.coding import Coding, site_params
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.codings.multigrain import Multigrain
from stages.codings.phase import Phase

CODINGS = [variant for coding in shipped().values() for variant in variants(coding)]
every_coding = pytest.mark.parametrize("coding", CODINGS, ids=label)


@functools.cache
def site(coding: Coding) -> dict[str, Tensor]:
    """Parameters of one fitted site whose scale is no power of two."""
    return site_params(fitted(coding), 1)


def test_the_shipped_neurons_are_found() -> None:
    assert {"las", "las_rounded", "phase", "multigrain", "gated"} <= set(shipped())
    assert {c.timesteps for c in CODINGS} == {1, 2, 4, 6, 8, 10}
    assert {c.grains for c in CODINGS if isinstance(c, Gated)} == {1, 2, 3}


def test_the_fitted_bases_are_decoupled() -> None:
    bases = [site(GRAINS)[name] for name in ("base_d", "base_h", "base_theta")]
    assert len(torch.cat(bases).unique()) == 6


def test_a_coding_without_a_scalar_loop_fails() -> None:
    class Newer(Las):
        pass

    with pytest.raises(pytest.fail.Exception, match="Newer is a neuron: add its scalar loop"):
        reference(Newer("newer", 4, "zero"), {})


@every_coding
def test_equals_the_scalar_loop_on_every_bfloat16(coding: Coding) -> None:
    x = bfloat16_patterns()
    assert len(x) == 2**16 - 2 * 2**7  # without inf and nan
    check_equal(coding, site(coding), x)


@every_coding
def test_equals_the_scalar_loop_around_every_breakpoint(coding: Coding) -> None:
    p = site(coding)
    x = around_breakpoints(reference(coding, p), coding.table(p))
    if isinstance(coding, Las | Gated):  # a base-2 range uses all of its 2^T codes
        assert len(x) >= 8 * (2**coding.timesteps - 1)
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


@every_coding
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


def test_the_population_count_is_that_of_python() -> None:
    codes = torch.arange(2**16)
    expected = [code.bit_count() for code in range(2**16)]
    assert neurons.popcount(codes.float()).tolist() == expected


# --- each check fails when what it guards is broken -----------------------------------------------

LAS, ROUNDED = Las("las", 6, "zero"), Las("las", 6, "half_step")
GATED = Gated("gated", 4, 3)
GRAINS = Multigrain("multigrain", 6, 2, "half_step", False)
TWO = Phase("phase", 6, 1, "half_step", True, 2)

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
    (GATED, "bank_encode", ">= limits", "> limits"),
    (GATED, "bank_encode", "* (1 - v0)", ""),
    (GATED, "bank_quantise", "candidate * (1 - v0)", "candidate"),
    (GATED, "bank_quantise", "magnitude < candidate", "magnitude <= candidate"),
    (GATED, "bank_quantise", "range(grains - 2, -1, -1)", "range(0, grains - 1)"),
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
    (TWO, "step_encode", "fired < max_spikes", "fired <= max_spikes"),
    (TWO, "step_quantise", "count < max_spikes", "count <= max_spikes"),
]


def broken(name: str, old: str, new: str) -> object:
    """The function of `stages.codings.neurons` with one piece of its source replaced."""
    source = re.sub('"""(?s:.*?)"""', "...", inspect.getsource(getattr(neurons, name)), count=1)
    assert source.count(old) == 1, f"{old!r} is no longer one place of {name}: update the mutation"
    scope = dict(vars(neurons))
    exec(source.replace(old, new), scope)
    return scope[name]


@pytest.mark.parametrize(("coding", "name", "old", "new"), BREAKS)
def test_the_comparison_fails_on_a_broken_neuron(
    coding: Coding, name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = site(coding)
    x = torch.cat(
        [around_breakpoints(reference(coding, p), coding.table(p)), heavy_tailed(2, 300)[1]]
    )
    check_equal(coding, p, x)
    monkeypatch.setattr(neurons, name, broken(name, old, new))
    with pytest.raises(AssertionError):
        check_equal(coding, p, x)


def test_the_comparison_fails_on_a_doubled_scale() -> None:
    p = site(GRAINS)
    wrong = p | {"scale": 2 * p["scale"]}
    x = heavy_tailed(2, 300)[1]
    expected = reference(GRAINS, p)
    values = torch.tensor([expected(v)[1] for v in x.abs().numpy()])
    assert torch.equal(GRAINS.quantise(x, p)[0].abs(), values)
    assert not torch.equal(GRAINS.quantise(x, wrong)[0].abs(), values)


def test_the_batch_comparison_fails_on_swapped_sites() -> None:
    p, x = fitted(GATED, sites=2), heavy_tailed(2, 300)
    swapped = {name: value.flip(0) for name, value in p.items()}
    assert not torch.equal(GATED.quantise(x, swapped)[0], GATED.quantise(x, p)[0])
