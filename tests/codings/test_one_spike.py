"""One-spike coding against an amplified membrane, all bases, a scalar softmax and traces."""

import math

import pytest
import torch
from torch import Tensor

from stages.codings.base import squared_error
from stages.codings.one_spike import OneSpike
from stages.errors import InputError
from stages.ports.kernels import softmax_kernel
from stages.ports.patched import patched
from stages.ports.port import SpikingPort
from tests.codings.reference import atoms_of, breakpoints, check_equal, heavy_tailed
from tests.ports.biases import bias


def params(coding: OneSpike, x: Tensor) -> dict[str, Tensor]:
    return {k: v[0].float() for k, v in coding.fit(atoms_of(x[None])).params.items()}


def amplified(x: float, largest: float, base: float, timesteps: int) -> tuple[int, float]:
    """A membrane that grows by B a step and fires once over M (1 + 1/B) / 2: time, and |value|."""
    v = abs(x)
    for t in range(timesteps):
        if v >= largest * (1 + 1 / base) / 2:
            return t, largest / base**t
        v *= base
    return timesteps, 0.0


@pytest.mark.parametrize(("timesteps", "base"), [(1, 2.0), (6, 1.7), (16, 1.4), (40, 1.15)])
def test_it_is_the_amplified_membrane(timesteps: int, base: float) -> None:
    coding, x = OneSpike("one_spike", timesteps, base), heavy_tailed(1, 3000)[0]
    p = params(coding, x)
    rows = [amplified(v, float(x.abs().max()), base, timesteps) for v in x.tolist()]
    time, magnitude = (torch.tensor(column) for column in zip(*rows, strict=True))
    code = coding.encode(x, p).code
    assert (code != time).float().mean() < 1e-3  # a value within rounding of a midpoint
    same = code == time
    value, count = coding.quantise(x, p)
    torch.testing.assert_close(value[same], (x.sign() * magnitude)[same], rtol=1e-5, atol=0)
    assert torch.equal(count, (code < timesteps).float())
    assert len(value.abs().unique()) <= timesteps + 1


@pytest.mark.parametrize(("timesteps", "base"), [(16, 1.4), (40, 1.15), (64, 1.05)])
def test_the_stepped_neuron_is_the_fast_path_in_long_windows(timesteps: int, base: float) -> None:
    coding = OneSpike("one_spike", timesteps, base)
    p = params(coding, heavy_tailed(1, 500)[0])
    x = breakpoints(coding, p)
    assert len(x) >= 8 * timesteps
    check_equal(coding, p, x)


def test_the_error_is_relative_and_small_values_vanish() -> None:
    base, timesteps = 1.4, 12
    coding = OneSpike("one_spike", timesteps, base)
    x = torch.cat([torch.linspace(1e-4, 1, 50_000), torch.ones(1)])
    value, _ = coding.quantise(x, params(coding, x))
    least = base ** -(timesteps - 1) * (1 + 1 / base) / 2
    relative = ((value - x).abs() / x)[x > least * 1.0001]
    assert float(relative.max()) == pytest.approx((base - 1) / (base + 1), rel=1e-3)
    assert bool((value[x < least * 0.9999] == 0).all())


@pytest.mark.parametrize("timesteps", [1, 3, 6, 10, 24])
def test_no_base_of_a_fine_scan_beats_the_one_found(timesteps: int) -> None:
    x = heavy_tailed(5, 800, seed=4)
    x = x.sign() * x.abs() ** torch.tensor([0.3, 0.6, 1.0, 1.5, 2.0])[:, None]
    atoms = atoms_of(x)
    found = OneSpike("one_spike", timesteps, None)
    p = found.fit(atoms).params
    least = squared_error(found, atoms, p)
    scan = []
    for base in torch.cat([torch.linspace(1.01, 3, 400), torch.linspace(3, 14, 100)]).tolist():
        coding = OneSpike("one_spike", timesteps, base)
        scan.append(squared_error(coding, atoms, coding.fit(atoms).params))
    best = torch.stack(scan).amin(0)
    assert bool((least <= best * 1.003).all()), (least / best, p["base"])
    if timesteps > 1:
        assert len(p["base"].unique()) == 5  # each site its own


def test_the_base_found_is_one_that_may_be_given() -> None:
    atoms = atoms_of(heavy_tailed(1, 500))
    found = OneSpike("one_spike", 8, None).fit(atoms).params
    given = OneSpike("one_spike", 8, float(found["base"])).fit(atoms).params
    assert found.keys() == given.keys()
    for name, value in found.items():
        torch.testing.assert_close(given[name], value, rtol=1e-5, atol=0)


# --- softmax --------------------------------------------------------------------------------------


def spike_shift(x: list[float], base: float, timesteps: int) -> list[float]:
    """B^-round((max - x) / ln B), none from T on, divided by the sum; x of the allowed keys."""
    steps = [round((max(x) - v) / math.log(base)) for v in x]
    weight = [base**-k if k < timesteps else 0.0 for k in steps]
    return [w / sum(weight) for w in weight]


def rows_of(scores: Tensor, scaling: float, mask: Tensor, base: float, timesteps: int) -> Tensor:
    """`spike_shift` of every row of scores [B, H, Q, K]; zero where the mask forbids."""
    expected = torch.zeros(scores.shape, dtype=torch.float64)
    allowed = mask.expand_as(scores)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        b, h, q = place
        seen = allowed[b, h, q]
        if bool(seen.any()):
            x = (scores[b, h, q][seen].double() * scaling).tolist()
            row = torch.tensor(spike_shift(x, base, timesteps), dtype=torch.float64)
            expected[b, h, q, seen] = row
    return expected


def agree(found: Tensor, expected: Tensor) -> bool:
    """Equal rows up to float32; a score within rounding of a half step may fall on either side."""
    close = ((found.double() - expected).abs() <= 1e-5 * (1e-3 + expected)).all(-1)
    return bool(close.double().mean() > 0.995)


@pytest.mark.parametrize(("timesteps", "base"), [(6, 1.7), (16, 1.4), (40, 1.15)])
def test_the_softmax_is_that_of_the_scalar_loop(timesteps: int, base: float) -> None:
    coding = OneSpike("one_spike", timesteps, base)
    assert coding.replaces_softmax
    p = params(coding, torch.rand(50))
    scores = 5 * torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1, 20, 20).tril().bool()
    mask[1, 0, :, :3] = False  # left pads: their rows see nothing
    probs, spikes = softmax_kernel(coding, True)(scores.clone(), 0.4, bias(mask), p)
    expected = rows_of(scores, 0.4, mask, base, timesteps)
    assert agree(probs, expected)
    assert not agree(probs, rows_of(scores, 0.4, mask, base * 1.1, timesteps))
    assert bool((probs[~mask.expand_as(probs)] == 0).all()) and bool(probs.isfinite().all())
    seen = mask.any(-1).expand(2, 3, 20)
    torch.testing.assert_close(probs.sum(-1), seen.float())
    assert bool((probs[~seen] == 0).all())
    assert torch.equal(spikes, (probs > 0).sum(-1).float())
    everywhere, fired = coding.softmax(scores, 0.4, mask, p)
    assert torch.equal(fired, (everywhere > 0).float())


def test_a_base_near_one_is_the_exact_softmax() -> None:
    scores = torch.rand(1, 2, 30, 30, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 30, 30).tril().bool()
    exact = scores.double().masked_fill(~mask, -torch.inf).softmax(-1)
    errors = []
    for base in (1.6, 1.2, 1.05, 1.017):  # 64 steps of 1.017 reach a score difference of 1
        coding = OneSpike("one_spike", 64, base)
        probs, _ = coding.softmax(scores, 1.0, mask, params(coding, torch.rand(9)))
        ratio = (probs.double() / exact)[mask.expand_as(exact)]
        errors.append(float((ratio - 1).abs().max()))
        assert errors[-1] < base - 1
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.017


def test_scores_that_overflow_give_no_nan() -> None:
    coding = OneSpike("one_spike", 8, 1.5)
    scores = torch.tensor([3e38, -3e38, 0.0, 3e38]).view(1, 1, 1, 4)
    mask = torch.tensor([True, True, True, False]).view(1, 1, 1, 4)
    probs, _ = coding.softmax(scores, 1.0, mask, params(coding, torch.rand(9)))
    assert probs.flatten().tolist() == [1, 0, 0, 0]


def test_a_patched_model_attends_by_spike_times(model, tokens, convert, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    seen = []

    class Recorded(SpikingPort):
        def softmax(self, scores, scaling, view):  # type: ignore[no-untyped-def]
            given = scores.clone()
            value, spikes = super().softmax(scores, scaling, view)
            seen.append((given, scaling, view.mask, value.clone(), float(self.params["base"])))
            return value, spikes

    coding = OneSpike("one_spike", 10, None)
    conversion = convert(model, coding, ("attn.probs",))
    ids = tokens(2, 12, seed=3)
    with torch.no_grad():
        dense = model(ids).logits
        monkeypatch.setattr("stages.ports.patched.SpikingPort", Recorded)
        with patched(model, conversion) as sites:
            spiking = model(ids).logits
    assert sites == len(seen) == 2
    for scores, scaling, mask, value, base in seen:
        assert agree(value, rows_of(scores, scaling, mask, base, 10))
    assert not torch.allclose(spiking, dense, atol=1e-3)


# --- the product of two spiking operands ----------------------------------------------------------


def by_traces(q: Tensor, k: Tensor, timesteps: int, base: float) -> Tensor:
    """q k^T of spike times, each (sign [N, D], time [N, D]), in steps: a trace decays by 1/B until its
    own spike and then stays; q_t trace_k + trace_q k_t - both."""
    (q_sign, q_time), (k_sign, k_time) = q, k
    score = torch.zeros(len(q_sign), len(k_sign), dtype=torch.float64)
    q_trace, k_trace = (torch.ones_like(s, dtype=torch.float64) for s in (q_sign, k_sign))
    for t in range(timesteps):
        if t > 0:
            q_trace = torch.where(q_time >= t, q_trace / base, q_trace)
            k_trace = torch.where(k_time >= t, k_trace / base, k_trace)
        q_now, k_now = (
            (time == t) * s * base**-t for time, s in ((q_time, q_sign), (k_time, k_sign))
        )
        q_past, k_past = (
            (time <= t) * s * trace
            for time, s, trace in ((q_time, q_sign, q_trace), (k_time, k_sign, k_trace))
        )
        score += q_now @ k_past.T + q_past @ k_now.T - q_now @ k_now.T
    return score


def test_traces_add_up_to_the_product_of_the_decoded_values() -> None:
    base, timesteps = 1.4, 16
    coding = OneSpike("one_spike", timesteps, base)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 9, 16, generator=generator)
    p = params(coding, torch.cat([q.flatten(), k.flatten()]))
    trains = []
    for x in (q, k):
        spikes = coding.encode(x, p)
        trains.append((spikes.sign.double(), spikes.time))
    largest = torch.cat([q, k]).abs().max().double()
    score = by_traces(*trains, timesteps, base) * largest**2
    decoded = coding.quantise(q, p)[0].double() @ coding.quantise(k, p)[0].double().T
    torch.testing.assert_close(score, decoded, rtol=1e-5, atol=1e-5)
    same = (trains[0][1][:, None] == trains[1][1][None]).any()
    assert bool(same)  # some spikes coincide, so the last term counts


@pytest.mark.parametrize(
    ("timesteps", "base", "key"),
    [
        (0, None, "coding.timesteps=0"),
        (65, None, "from 1 to 64"),
        (2.5, None, "coding.timesteps"),
        (6, 1.0, "coding.base=1"),
        (6, 0.5, "coding.base=0.5"),
    ],
)
def test_what_it_cannot_be_is_refused(timesteps: int, base: float | None, key: str) -> None:
    with pytest.raises(InputError, match=key) as caught:
        OneSpike("one_spike", timesteps, base)
    assert "\n" not in str(caught.value)
