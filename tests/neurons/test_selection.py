"""The compiled sums that the spikes of probabilities select, against float64 and the code itself."""

import ctypes
import shutil
from dataclasses import replace

import pytest
import torch

from stages.codings.base import site_params
from stages.codings.gated import Gated
from stages.codings.timed import Timed
from stages.codings.ttfs import Ttfs
from stages.compiler import use_compiler
from stages.neurons.channels import unscaled
from stages.neurons.lookup import Lookup, lookups
from stages.neurons.selection import normalised, selection
from stages.neurons.stairs import stairs
from stages.ports.tables import Tables, Tabulated
from tests.codings.reference import fitted, shipped
from tests.ports.biases import bias

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    or not hasattr(ctypes.CDLL(None), "GOMP_parallel"),
    reason="no C++ compiler, or other threads",
)
MARGIN = 3e-6  # of a probability, by whose exponential its code is decided
# (batch, heads, groups, queries, keys)
SHAPES = [
    (1, 6, 2, 64, 100),
    (2, 3, 3, 5, 40),
    (1, 1, 1, 33, 700),
    (2, 4, 1, 1, 17),
    (1, 2, 2, 9, 9),
]
GATED = Gated("gated", 6, 2)
P = {"scale": torch.tensor([0.03, 0.97])}


@pytest.fixture(autouse=True)
def compiler_on():
    use_compiler(True)


def drawn(batch, heads, groups, queries, keys, width=None):
    """Scores, values that show every probability (or of a width), and the place of what comes out."""
    generator = torch.Generator().manual_seed(keys)
    scores = 10 * torch.randn(batch, heads, queries, keys, generator=generator)
    value = torch.eye(keys).expand(batch, groups, keys, keys)
    if width is not None:
        value = torch.randn(batch, groups, keys, width, generator=generator)
    return scores, value, torch.empty(batch, queries, heads, value.shape[-1])


def site(coding):
    """The coding and the parameters of a site of numbers up to about 1."""
    return coding.at_site(unscaled(site_params(fitted(coding, 1, 0.02), 0)))


def triangle(batch, queries, keys):
    """Query i sees the keys up to keys - queries + i."""
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return mask.expand(batch, 1, queries, keys)


def probabilities(scores, mask, scaling=0.3):
    return (scores.double() * scaling).masked_fill(~mask, -torch.inf).softmax(-1)


def check(coded, fired, code, exact, mask):
    """The codes are those of the probabilities, but for some next to a breakpoint."""
    low, high = (code((exact * (1 + way * MARGIN)).float())[0] for way in (-1, 1))
    unclear = low != high
    assert bool(((coded == low) | (coded == high)).all()) and unclear.float().mean() < 1e-2
    count = torch.where(mask, code(exact.float())[1], 0).sum(-1)
    sure = ~unclear.any(-1)
    assert torch.equal(fired[sure], count[sure].float()) and bool(sure.any())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_the_codes_are_those_of_float64_probabilities(shape, masked):
    scores, value, out = drawn(*shape)
    batch, _, _, queries, keys = shape
    (table,) = lookups(GATED, [P])
    mask = triangle(batch, queries, keys)
    given = None
    if masked:
        mask = mask & (torch.arange(keys) % 7 != 3)
        mask[..., 0] = True
        given = bias(mask)
    fired = selection(stairs(table))(scores.clone(), 0.3, given, value, out)
    coded = out.transpose(1, 2)
    exact = probabilities(scores, mask)
    check(coded, fired, lambda x: GATED.quantise(x, P), exact, mask)
    assert not coded.masked_select(~mask).any() and coded.count_nonzero() > 8


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_coding_with_a_table_has_the_codes_of_its_expression(name):
    coding, own = site(shipped()[name])
    kernel = Tabulated(coding, own, True, Tables())
    scores, value, out = drawn(1, 3, 1, 64, 128)
    fired = kernel.attend(scores.clone(), 0.3, None, value, out)
    if coding.replaces_softmax:
        assert fired is None
        return
    (table,) = lookups(coding, [own])
    silent = not any(bool(each) for each in coding.quantise(torch.zeros(1), own))
    assert (fired is not None) == (table is not None and silent)
    if fired is not None:
        assert len(out.unique()) > (2 if coding.timesteps > 1 else 1) and fired.any()
        mask = triangle(1, 64, 128)
        exact = probabilities(scores, mask)
        check(out.transpose(1, 2), fired, lambda x: coding.quantise(x, own), exact, mask)


def test_the_exponential_and_the_sum_are_right_to_the_last_bits():
    """Codes with a stair around one probability, as wide as its error may be."""
    scores, value, out = drawn(1, 1, 1, 20, 200)
    mask = triangle(1, 20, 200)
    exact, width = probabilities(scores / 5, mask, 0.25), 8 * 2.0**-24
    for query, key in zip(range(20), range(0, 180, 9), strict=True):
        number = exact[0, 0, query, key]
        low, high = (float(number * (1 + way * width)) for way in (-1, 1))
        edge, level = torch.tensor([low, high, torch.inf]), torch.tensor([0, 1.0, 0, 0])
        table = Lookup(edge, level, torch.zeros(4))
        selection(stairs(table))(scores / 5, 0.25, None, value, out)
        assert out[0, query, 0, key] == 1 and out.sum() < 5


@pytest.mark.parametrize("width", [1, 5, 64, 80])
def test_the_values_are_added_up_where_they_stand(width):
    """In slices of a larger pass, as blocks are; with the sums of a matrix product."""
    shape = (2, 4, 2, 20, 600)
    scores, value, out = drawn(*shape, width)
    coding, own = site(Timed("timed", 32, 2))
    (table,) = lookups(coding, [own])
    coded = selection(stairs(table))
    heads, ones = torch.empty(2, 20, 4, 600), torch.eye(600).expand(2, 2, 600, 600)
    coded(scores.clone(), 0.1, None, ones, heads)
    wide = torch.full((3, 50, 6, width), -1.0)
    rows = torch.cat([value, value], 2)[:, :, :600]
    found = wide[1:, 7:27, 1:5]
    coded(scores.clone(), 0.1, None, rows, found)
    expected = torch.einsum(
        "bqhk,bhkd->bqhd", heads.double(), value.double().repeat_interleave(2, 1)
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert bool(
        (wide[0] == -1).all() and (wide[1:, :7] == -1).all() and (wide[1:, :, 5] == -1).all()
    )
    assert heads.count_nonzero() > 1000 and out.shape == found.shape


def test_threads_give_the_same_bits():
    (table,) = lookups(GATED, [P])
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        scores, value, out = drawn(1, 6, 2, 64, 301, 24)
        fired = selection(stairs(table))(scores, 0.3, None, value, out)
        results.append((out, fired))
    torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for row in results[1:] for a, b in zip(row, results[0], strict=True)
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_softmax_is_no_number(bad):
    """And no other row is touched by it."""
    (table,) = lookups(GATED, [P])
    scores, value, out = drawn(1, 2, 1, 6, 40, 8)
    clean = out.clone()
    selection(stairs(table))(scores.clone(), 0.3, None, value, clean)
    scores[0, 1, 3] = bad
    fired = selection(stairs(table))(scores, 0.3, None, value, out)
    assert bool(out[0, 3, 1].isnan().all()) and not fired[0, 1, 3]
    clean[0, 3, 1] = out[0, 3, 1] = 0
    assert torch.equal(clean, out)
    one = torch.zeros(1, 1, 1, 40)
    one[..., 1:] = -torch.inf
    place = torch.empty(1, 1, 1, 40)
    selection(stairs(table))(one, 0.3, None, torch.eye(40)[None, None], place)
    assert place[0, 0, 0, 0] == table(torch.ones(1))[0] and not place[..., 1:].any()


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_a_key_that_takes_all_is_a_number(masked):
    """The logit that is rounded as the largest is not when its exponential is taken."""
    (table,) = lookups(GATED, [P])
    scores, value, out = drawn(1, 50, 1, 4, 64, 8)
    scores[..., 5] = 500 + 9 * scores[..., 5]
    given = torch.zeros(1, 1, 4, 64) if masked else None
    for width in (64, 80, 96, 128):  # of heads: their scalings are powers of two, and are not
        selection(stairs(table))(scores.clone(), width**-0.5, given, value, out)
        one = table(torch.ones(1))[0]
        torch.testing.assert_close(out, (one * value[:, :, 5]).expand_as(out))


def test_what_does_not_fit_is_left_to_the_kernels():
    kernel = Tabulated(GATED, P, False, Tables())
    scores, value, out = drawn(1, 4, 2, 64, 100, 8)
    assert kernel.attend(scores.clone(), 0.3, None, value, out) is not None
    half, mask = scores.bfloat16(), torch.zeros(1, 1, 64, 50)
    for given in (half, scores.transpose(2, 3), scores[:, :, :2]):
        assert kernel.attend(given, 0.3, None, value, out) is None
    assert kernel.attend(scores, 0.3, mask, value, out) is None
    assert kernel.attend(scores, 0.3, None, value.double(), out) is None
    for other in (value[..., :7], value[:, :, :90], torch.cat([value, value], -1)):
        assert kernel.attend(scores, 0.3, None, other, out) is None
    assert kernel.attend(scores, 0.3, None, value.transpose(2, 3), out) is None
    use_compiler(False)
    assert Tabulated(GATED, P, False, Tables()).attend(scores, 0.3, None, value, out) is None


def test_a_code_with_a_value_for_zero_is_left_to_the_kernels():
    loud = Ttfs("ttfs", 64, None, False)
    (table,) = lookups(loud, [site(loud)[1]])
    assert bool(table.spikes[table(torch.zeros(1))[1]]) and selection(stairs(table)) is None
    (table,) = lookups(GATED, [P])
    assert selection(stairs(table)) is not None
    assert selection(stairs(replace(table, spikes=table.spikes + 1))) is None
    assert selection(stairs(replace(table, value=table.value + 1))) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_softmax_alone_is_that_of_float64(shape):
    scores, _, _ = drawn(*shape)
    batch, _, _, queries, keys = shape
    mask = triangle(batch, queries, keys)
    exact = probabilities(scores, mask)
    assert normalised(scores, 0.3, bias(mask))
    torch.testing.assert_close(scores.double(), exact, rtol=MARGIN, atol=1e-37)
    assert not scores.masked_select(~mask).any()
    nothing = torch.ones(1, 2, 1, 20)
    assert normalised(nothing, 0.3, bias(torch.zeros(1, 1, 1, 20).bool()))
    torch.testing.assert_close(
        nothing, torch.full_like(nothing, 1 / 20)
    )  # as of what is masked whole
    use_compiler(False)
    assert not normalised(nothing, 0.3, torch.zeros(1, 1, 1, 20))
