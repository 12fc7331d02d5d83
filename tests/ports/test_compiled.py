"""The compiled kernels against the same expressions run eagerly."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stages import compiler
from stages.codings.base import Coding, site_params
from stages.codings.gated import Gated
from stages.codings.integer import Integer
from stages.codings.multigrain import Multigrain
from stages.codings.oat import Oat
from stages.codings.one_spike import OneSpike
from stages.codings.rate import Rate
from stages.codings.signed_digit import SignedDigit
from stages.codings.timed import Timed
from stages.codings.ttfs import Ttfs
from stages.compiler import compiled, use_compiler
from stages.ports.kernels import (
    EAGER_BELOW,
    dense_softmax,
    masked_softmax,
    row_kernel,
    softmax_kernel,
)
from tests.codings.reference import around_breakpoints, fitted, heavy_tailed, reference
from tests.ports.biases import bias

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
GATED = Gated("gated", 6, 2)
OFFSET, SIGNED = Gated("gated", 3, 3, offset=True), SignedDigit("signed_digit", 3, 2)
GRAINS = Multigrain("multigrain", 6, 2, "half_step", False)
CHANNELS = 48


@pytest.fixture(autouse=True)
def compiler_on() -> Iterator[None]:
    """Kernels of more than one thread, as users compile them."""
    use_compiler(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    yield
    torch.set_num_threads(threads)


def graphs() -> int:
    """Graphs that torch.compile has built in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def parameters(coding: Coding, site: int) -> dict[str, Tensor]:
    """Those of one site, fitted without the compiler, which has its tests elsewhere."""
    use_compiler(False)
    p = site_params(fitted(coding), site)
    use_compiler(True)
    return p


def rows(coding: Coding, p: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Enough rows to be compiled: heavy-tailed values, every breakpoint, zeros, inf. [R, C]"""
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-42, -1e38])
    edges = around_breakpoints(reference(coding, p), coding.table(p))
    x = torch.cat([special, edges, heavy_tailed(1, 2 * EAGER_BELOW)[0]])
    return x[: len(x) // CHANNELS * CHANNELS].view(-1, CHANNELS).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize(
    ("coding", "counted", "dtype"),
    [
        (GATED, True, torch.float32),
        pytest.param(GRAINS, True, torch.bfloat16, marks=pytest.mark.slow),
        (GRAINS, False, torch.float32),
        pytest.param(OFFSET, True, torch.float32, marks=pytest.mark.slow),
        pytest.param(SIGNED, True, torch.float32, marks=pytest.mark.slow),
        pytest.param(
            Gated("gated", 5, 3, offset=True, radix=4), True, torch.float32, marks=pytest.mark.slow
        ),
        pytest.param(
            SignedDigit("signed_digit", 6, 2, offset=True, radix=8),
            True,
            torch.float32,
            marks=pytest.mark.slow,
        ),
        pytest.param(Oat("oat", 6, "zero", 99.0), True, torch.float32, marks=pytest.mark.slow),
        (Ttfs("ttfs", 128, None, True), True, torch.float32),
        pytest.param(OneSpike("one_spike", 40, 1.15), True, torch.float32, marks=pytest.mark.slow),
        pytest.param(Timed("timed", 64, 2), True, torch.float32, marks=pytest.mark.slow),
        pytest.param(
            Timed("timed", 64, 2, levels="free"), True, torch.bfloat16, marks=pytest.mark.slow
        ),
    ],
    ids=[
        "ranges-counted-float32",
        "steps-counted-bfloat16",
        "steps-uncounted-float32",
        "offset-counted-float32",
        "signed-counted-float32",
        "digits-counted-float32",
        "signed_digits-counted-float32",
        "bank-counted-float32",
        "latency-counted-float32",
        "one_spike-counted-float32",
        "timed-counted-float32",
        "timed_free-counted-bfloat16",
    ],
)
def test_a_compiled_row_kernel_gives_the_eager_bits(
    coding: Coding, counted: bool, dtype: torch.dtype
) -> None:
    p = parameters(coding, 1)
    x = rows(coding, p, dtype)
    kernel = row_kernel(coding, counted)
    before = graphs()
    value, spikes = kernel(x.view(2, -1, CHANNELS) if len(x) % 2 == 0 else x[None], p)
    assert graphs() > before and compiled()  # it was not the eager fallback
    expected, count = coding.quantise(x, p)
    assert value.dtype == dtype
    assert torch.equal(bits(value.view(x.shape)), bits(expected.to(dtype)))
    if counted:
        assert torch.equal(spikes, count.sum(-1))
        small, small_spikes = kernel(x[:2], p)  # too few values: eager
        assert torch.equal(small, value.view(x.shape)[:2])
        assert torch.equal(small_spikes, spikes[:2])
    else:
        assert spikes.numel() == 0
    other = parameters(coding, 0)
    assert not torch.equal(kernel(x, other)[0].view(x.shape), value.view(x.shape))


@pytest.mark.parametrize(
    ("coding", "heads"),
    [
        pytest.param(GATED, 1, id="1-gated", marks=pytest.mark.slow),
        pytest.param(GATED, 6, id="6-gated"),
        pytest.param(Rate("rate", 8, levels=4), 1, id="1-rate", marks=pytest.mark.slow),
        pytest.param(Rate("rate", 8, levels=4), 6, id="6-rate", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_row_kernel_with_scales_gives_the_eager_bits(coding: Coding, heads: int) -> None:
    p = parameters(coding, 1)
    channel = 0.1 + torch.rand(CHANNELS, generator=torch.Generator().manual_seed(0))
    x = rows(coding, p, torch.float32).nan_to_num(posinf=9, neginf=-9)[None]  # [1, R, C]
    expected, count = coding.quantise(x / channel, p)
    split = x.unflatten(-1, (heads, -1)).transpose(1, 2) if heads > 1 else x  # as queries come
    before = graphs()
    value, spikes = row_kernel(coding, True)(split, p | {"channel": channel})
    assert graphs() > before and compiled()
    wanted, counts = expected * channel, count
    if heads > 1:
        wanted, counts = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (wanted, counts))
    assert torch.equal(value, wanted)
    assert torch.equal(spikes.view(split.shape[:-1]), counts.sum(-1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per", ["tensor", "token"])
def test_compiled_integers_have_the_eager_bits(per: str, dtype: torch.dtype) -> None:
    coding = Integer(bits=6, per=per)
    p = site_params(fitted(coding), 1)
    middle = (coding.table(p).unique() + p["scale"] / 62).repeat_interleave(2)
    edges = torch.cat([middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1)])
    x = torch.cat([edges, -edges, heavy_tailed(1, 2 * EAGER_BELOW)[0]])
    x = x[: len(x) // CHANNELS * CHANNELS].view(1, -1, CHANNELS).to(dtype)
    before = graphs()
    value, spikes = row_kernel(coding, False)(x, p)
    assert graphs() > before and compiled() and spikes.numel() == 0
    assert torch.equal(bits(value), bits(coding.quantise(x, p)[0].to(dtype)))
    heads = x.unflatten(-1, (6, -1)).transpose(1, 2)  # as queries come: a head's vector is a token
    assert torch.equal(
        row_kernel(coding, False)(heads, p)[0], coding.quantise(heads, p)[0].to(dtype)
    )


@pytest.mark.parametrize("heads", [1, 2])
def test_a_compiled_softmax_kernel_differs_only_next_to_a_breakpoint(heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 6 * torch.randn(1, heads, 128, 128, generator=generator)
    mask = torch.ones(128, 128).tril().bool()[None, None]
    p = {"scale": torch.tensor([0.03, 0.97])}
    before = graphs()
    value, spikes = softmax_kernel(GATED, True)(scores.clone(), 0.25, bias(mask), p)
    assert graphs() > before and compiled()
    probs = dense_softmax(scores.clone(), 0.25, bias(mask))
    assert compiled()
    torch.testing.assert_close(probs, masked_softmax(scores, 0.25, mask), rtol=1e-5, atol=0)
    masked = (scores.double() * 0.25).masked_fill(~mask, -torch.inf)
    probability = masked.softmax(-1)
    torch.testing.assert_close(
        masked_softmax(scores, 0.25, mask), probability.float(), rtol=1e-6, atol=0
    )
    low, high = (
        GATED.quantise((probability * (1 + sign * 2e-6)).float(), p)[0] for sign in (-1, 1)
    )
    unclear = low != high
    assert bool(((value == low) | (value == high)).all())
    assert unclear.float().mean() < 1e-3  # the margin decides almost nothing
    assert torch.equal(value[..., ~mask[0, 0]], torch.zeros_like(value[..., ~mask[0, 0]]))
    assert value.count_nonzero() > 1000
    count = GATED.quantise(probability.float(), p)[1].sum(-1)
    assert torch.equal(spikes[~unclear.any(-1)], count[~unclear.any(-1)])


def test_compiled_probabilities_have_the_range_of_their_query() -> None:
    """But for those next to a breakpoint, as the softmax differs in its last bits."""
    coding = Integer(bits=5)
    p = site_params(fitted(coding), 1)
    generator = torch.Generator().manual_seed(0)
    scores = 6 * torch.randn(1, 2, 128, 128, generator=generator)
    mask = torch.ones(128, 128).tril().bool()[None, None]
    before = graphs()
    value, _ = softmax_kernel(coding, False)(scores.clone(), 0.25, bias(mask), p)
    assert graphs() > before and compiled()
    probability = masked_softmax(scores, 0.25, mask)
    largest = probability.amax(-1, keepdim=True)
    exact = (probability / largest * 15).round() * largest / 15
    unclear = ~torch.isclose(value, exact, rtol=1e-5, atol=0)
    assert unclear.float().mean() < 1e-3
    assert bool(((value - exact).abs() < 1.01 * largest / 15).all())
    assert torch.equal(value[..., ~mask[0, 0]], torch.zeros_like(value[..., ~mask[0, 0]]))


def test_the_switch_turns_compilation_off() -> None:
    p = parameters(GATED, 1)
    use_compiler(False)
    assert not compiled()
    before = graphs()
    x = heavy_tailed(1, 2 * EAGER_BELOW)[0].view(-1, 64)
    value, _ = row_kernel(Gated("gated", 5, 2), True)(x, p)
    assert graphs() == before
    assert torch.equal(value, Gated("gated", 5, 2).quantise(x, p)[0])
    use_compiler(True)


def test_a_failing_compiler_is_logged_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no C++ here\nand much more")

    monkeypatch.setattr(compiler._Compiler, "enabled", True)
    monkeypatch.setattr(compiler._Compiler, "failure", None)
    monkeypatch.setattr(torch, "compile", lambda kernel, **options: fails)
    twice = compiler.fused(lambda x: 2 * x)
    assert twice(4) == 8
    assert not compiled()
    assert "no C++ here" in caplog.text and "much more" not in caplog.text
    use_compiler(True)
    assert not compiled()  # it failed: asking again changes nothing


@pytest.mark.parametrize(
    "coding", [OFFSET, pytest.param(SIGNED, marks=pytest.mark.slow)], ids=["binary", "signed"]
)
def test_a_radix_given_by_site_is_compiled_as_well(coding: Coding) -> None:
    p = parameters(coding, 1)
    x = rows(coding, p, torch.float32)
    for size in (1.0, 2.0, 3.0):
        given = p | {"radix": torch.tensor(size)}
        value, spikes = row_kernel(coding, True)(x, given)
        expected, count = coding.quantise(x, given)
        assert compiled()
        assert torch.equal(bits(value), bits(expected)) and torch.equal(spikes, count.sum(-1))
