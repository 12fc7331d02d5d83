"""The latency code against its equation in float64, its linear layer and its zero."""

import inspect
import re
import textwrap
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings import ttfs
from stages.codings.ttfs import Ttfs
from stages.errors import InputError
from stages.neurons.spikes import SpikeTime, decode
from stages.ports.kernels import softmax_kernel
from tests.codings.reference import atoms_of, breakpoints, check_equal, heavy_tailed
from tests.ports.biases import bias


def site(coding: Ttfs, low: float, high: float, x: Tensor | None = None) -> dict[str, Tensor]:
    """Parameters of a site whose values run from low to high."""
    largest = torch.tensor([max(abs(low), abs(high))], dtype=torch.float64)
    atoms = atoms_of(largest[None] if x is None else x[None], largest)
    ends = torch.tensor([[low, high]], dtype=torch.float64)
    params = coding.fit(replace(atoms, extremes=ends)).params
    return {name: value[0].float() for name, value in params.items()}


def equation(x: Tensor, low: float, high: float, timesteps: int) -> tuple[Tensor, Tensor]:
    """(b - x) / (b - a) (T - 1), whose rounded and clipped value is t, and b - t (b - a) / (T - 1)."""
    t = (high - x.double()) / (high - low) * (timesteps - 1)
    time = t.round().clamp(0, timesteps - 1)
    return t, high - time * (high - low) / (timesteps - 1)


@pytest.mark.parametrize("timesteps", [2, 3, 16, 128, 4096])
@pytest.mark.parametrize(("low", "high"), [(-3.3, 7.1), (-0.278, 26.0), (-8.0, 0.0), (0.0, 0.9)])
def test_it_is_the_equation(timesteps: int, low: float, high: float) -> None:
    coding = Ttfs("ttfs", timesteps, None, False)
    p = site(coding, low, high)
    generator = torch.Generator().manual_seed(timesteps)
    x = 1.2 * (low + (high - low) * torch.rand(20_000, generator=generator))
    t, expected = equation(x, low, high, timesteps)
    clear = (t - t.floor() - 0.5).abs() > 1e-3
    assert clear.float().mean() > 0.99
    value, count = coding.quantise(x, p)
    torch.testing.assert_close(
        value[clear].double(), expected[clear], rtol=0, atol=1e-6 * (high - low)
    )
    assert bool((count == 1).all())
    inside = (x >= low) & (x <= high)
    half_step = (high - low) / (timesteps - 1) / 2
    assert bool(((value - x).abs()[inside] <= half_step * 1.001 + 1e-6).all())


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize(("low", "high"), [(-3.3, 7.1), (-8.0, 0.0), (0.0, 0.9)])
def test_the_stepped_neuron_is_the_fast_path_at_uneven_ends(
    silent: bool, low: float, high: float
) -> None:
    coding = Ttfs("ttfs", 50, None, silent)
    p = site(coding, low, high)
    check_equal(coding, p, torch.cat([breakpoints(coding, p), heavy_tailed(1, 300)[0]]))
    longest = Ttfs("ttfs", 4096, None, silent)
    check_equal(longest, site(longest, low, high), heavy_tailed(1, 100, seed=1)[0])


def test_every_interval_holds_zero() -> None:
    coding = Ttfs("ttfs", 11, None, False)
    for low, high, ends in ((2.0, 10.0, (0, 10)), (-10.0, -2.0, (-10, 0)), (-5.0, 10.0, (-5, 10))):
        table = coding.table(site(coding, low, high))[:11]
        assert (float(table.min()), float(table.max())) == pytest.approx(ends)


def test_a_percentile_clips_both_ends_where_it_is_nearer() -> None:
    x = torch.linspace(0.01, 1, 100, dtype=torch.float64)  # percentile 90 is 0.9
    coding = Ttfs("ttfs", 11, 90.0, False)
    for low, high, ends in (
        (-1.0, 1.0, (-0.9, 0.9)),
        (-0.2, 1.0, (-0.2, 0.9)),
        (0.0, 0.5, (0, 0.5)),
    ):
        table = coding.table(site(coding, low, high, x))[:11]
        assert (float(table.min()), float(table.max())) == pytest.approx(ends)
    sparse = torch.cat([torch.zeros(99), torch.ones(1)])  # its percentile 90 is zero
    table = coding.table(site(coding, 0.0, 1.0, sparse))
    assert (float(table.min()), float(table.max())) == (0, 1)


def test_zero_among_probabilities_is_exact_whatever_the_largest() -> None:
    generator = torch.Generator().manual_seed(0)
    for timesteps in (2, 7, 100, 128, 1000, 4096):
        for silent in (True, False):
            coding = Ttfs("ttfs", timesteps, None, silent)
            for high in torch.rand(50, generator=generator).tolist():
                value, count = coding.quantise(torch.zeros(1), site(coding, 1e-9, high))
                assert float(value) == 0 and float(count) == (not silent)


def test_a_masked_key_stays_unseen() -> None:
    coding = Ttfs("ttfs", 128, None, False)
    scores = torch.randn(1, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(9, 9).tril().bool()[None, None]
    probs, spikes = softmax_kernel(coding, True)(scores, 0.5, bias(mask), site(coding, 1e-6, 0.83))
    assert bool((probs[..., ~mask[0, 0]] == 0).all()) and probs.count_nonzero() > 50
    assert torch.equal(spikes, torch.arange(1.0, 10).expand(1, 2, 9))


def test_silence_changes_the_count_and_no_value() -> None:
    x = heavy_tailed(1, 2000)[0]
    spiking, silent = (Ttfs("ttfs", 128, None, flag) for flag in (False, True))
    p = site(spiking, float(x.min()), float(x.max()))
    value, count = spiking.quantise(x, p)
    same, fewer = silent.quantise(x, p)
    assert torch.equal(value, same)
    nearest = spiking.table(p)[:128].abs().argmin()
    assert torch.equal(fewer == 0, value == spiking.table(p)[nearest])
    assert 0 < float(fewer.mean()) < float(count.mean()) == 1


def test_a_linear_layer_needs_one_accumulation_a_spike_and_one_multiplication() -> None:
    """b Σ w - δ Σ w t, where the sum Σ w t is the weights that have arrived, added once every step."""
    coding, timesteps = Ttfs("ttfs", 32, None, False), 32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, generator=generator)
    weight = torch.randn(7, 40, generator=generator, dtype=torch.float64)
    p = site(coding, -2.5, 3.1)
    time = coding.encode(x, p).time
    potential = torch.zeros(5, 7, dtype=torch.float64)
    arrived = torch.zeros(5, 7, dtype=torch.float64)
    for t in range(timesteps - 1):
        arrived += (time == t).double() @ weight.T
        potential += weight.sum(-1) - arrived  # a weight waits at every step before its spike
    delta = (3.1 + 2.5) / (timesteps - 1)
    output = 3.1 * weight.sum(-1) - delta * potential
    decoded = coding.quantise(x, p)[0].double() @ weight.T
    torch.testing.assert_close(output, decoded, rtol=1e-5, atol=1e-4)
    assert coding.decode_macs == 1


def test_an_atom_of_both_signs_costs_what_each_sign_does() -> None:
    """Values of one sign get the whole resolution."""
    value = torch.linspace(0.01, 1, 100, dtype=torch.float64)[None]
    even = Atoms(
        value, torch.zeros_like(value), torch.full_like(value, 0.01), torch.ones(1).double()
    )
    ends = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    positive = replace(even, negative=torch.zeros_like(value), extremes=ends)
    coding = Ttfs("ttfs", 8, None, False)
    one, both = (coding.fit(atoms).params["step"] for atoms in (positive, even))
    assert float(both) == pytest.approx(2 * float(one))


MUTATIONS = [
    ("encode", "wait <= t + 0.5", "wait < t"),
    ("encode", "self.timesteps - 1, dtype", "0, dtype"),
    ("encode", "waiting & ~fires", "waiting"),
    ("quantise", "torch.ceil(wait - 0.5)", "torch.floor(wait)"),
    ("quantise", "torch.ceil(wait - 0.5)", "torch.floor(wait + 0.5)"),
    ("quantise", "self.timesteps - 1)", "self.timesteps)"),
    ("quantise", "!= _zero_time", "== _zero_time"),
    ("table", "[time.expand(*step.shape[:-1], -1), silent]", "[silent, time]"),
]


@pytest.mark.parametrize(("method", "old", "new"), MUTATIONS)
def test_the_comparison_fails_on_a_broken_neuron(
    method: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    coding = Ttfs("ttfs", 16, None, True)
    # Steps and halves that float32 holds exactly, so that ties are hit.
    p = {"origin": torch.tensor(7.0), "step": torch.tensor(0.5)}
    x = torch.cat([breakpoints(coding, p), torch.arange(-20, 21) / 4])
    check_equal(coding, p, x)
    source = textwrap.dedent(inspect.getsource(getattr(Ttfs, method)))
    source = re.sub('"""(?s:.*?)"""', "...", source, count=1)
    assert source.count(old) == 1
    scope = dict(vars(ttfs))
    exec("from __future__ import annotations\n" + source.replace(old, new), scope)
    monkeypatch.setattr(Ttfs, method, scope[method])
    with pytest.raises((AssertionError, IndexError)):
        check_equal(coding, p, x)


@pytest.mark.parametrize(
    ("timesteps", "percentile", "key"),
    [
        (1, None, "coding.timesteps=1"),
        (4097, None, "from 2 .* to 4096"),
        (2.5, None, "coding.timesteps"),
        ("128", None, "coding.timesteps"),
        (128, 100.0, "coding.percentile=100"),
        (128, 20.0, "null for the extremes"),
    ],
)
def test_what_it_cannot_be_is_refused(timesteps: int, percentile: float | None, key: str) -> None:
    with pytest.raises(InputError, match=key) as caught:
        Ttfs("ttfs", timesteps, percentile, False)
    assert "\n" not in str(caught.value)


def test_its_spikes_are_their_times() -> None:
    spikes = SpikeTime(torch.tensor([1, -1, 1]), torch.tensor([0, 3, 4]), 4)
    assert spikes.code.tolist() == [0, 3, 4] and spikes.count.tolist() == [1, 1, 0]
    table = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    assert decode(spikes, table).tolist() == [8, -1, 0]
