"""What codes by tables against the expressions of the codings, and when a table is made."""

import copy
import shutil
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

from stages.codings.base import site_params
from stages.codings.gated import Gated
from stages.codings.integer import Integer
from stages.codings.ttfs import Ttfs
from stages.compiler import use_compiler
from stages.neurons.stairs import ALONE
from stages.ports import tables
from stages.ports.kernels import EAGER_BELOW, row_kernel, softmax_kernel
from stages.ports.port import SpikingPort
from stages.ports.tables import TABLE_AFTER, Tables, Tabulated
from tests.codings.reference import fitted
from tests.ports.biases import bias

compiles = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
GATED = Gated("gated", 5, 2)
WIDTH = 96


def params(coding, channels=()):
    """Of a site, with scales and means of `channels` fewer than a row has."""
    generator = torch.Generator().manual_seed(0)
    own = site_params(fitted(coding), 0)
    drawn = {"channel": torch.rand(90, generator=generator) + 0.2}
    drawn["centre"] = torch.randn(90, generator=generator)
    return own | {name: drawn[name] for name in channels}


def values(heads, dtype, rows=EAGER_BELOW // WIDTH + 1):
    x = 2 * torch.randn(1, rows, WIDTH, generator=torch.Generator().manual_seed(1))
    x = x.to(dtype)
    return x if heads == 1 else x.unflatten(-1, (heads, -1)).transpose(1, 2)


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    "channels", [(), ("channel",), ("centre",), ("channel", "centre")], ids=str
)
def test_rows_by_a_table_have_the_bits_of_the_expression(heads, channels, dtype):
    p, x = params(GATED, channels), values(heads, dtype)
    expected, count = row_kernel(GATED, True)(x, p)  # the tests compile nothing unless asked
    use_compiler(True)
    for counted in (True, False):
        found, spikes = Tabulated(GATED, p, counted, Tables()).rows(x, p)
        assert found.dtype == dtype and torch.equal(found, expected)
        if counted:
            assert torch.equal(spikes.view(count.shape), count)
    place = x.clone()
    found, _ = Tabulated(GATED, p, False, Tables()).rows(place, p, place)
    assert torch.equal(found, expected)
    assert (found is place) == (dtype == torch.float32)
    assert len(expected.unique()) > 50


@compiles
@pytest.mark.parametrize("coding", [GATED, Ttfs("ttfs", 64, None, False)], ids=["", "loud"])
def test_spikes_of_probabilities_are_those_of_keys_that_a_query_sees(coding):
    """Also where zero has one, and of a query that sees no key."""
    p, generator = params(coding), torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(2, 3, 60, 60, generator=generator)
    mask = torch.ones(60, 60).tril().bool().expand(2, 1, 60, 60).clone()
    mask[1, :, 7] = False
    value, count = softmax_kernel(coding, True)(scores.clone(), 0.3, bias(mask), p)
    use_compiler(True)
    found, spikes = Tabulated(coding, p, True, Tables()).softmax(scores.clone(), 0.3, bias(mask))
    near = ~torch.isclose(found, value, rtol=1e-5)  # next to a breakpoint
    assert near.float().mean() < 1e-3
    sure = ~near.any(-1)
    assert torch.equal(spikes[sure], count[sure].float()) and spikes[sure].max() > 3
    assert not spikes[1, :, 7].any() and sure.float().mean() > 0.9
    scores[0, 0, 5, 2] = torch.nan
    _, spikes = Tabulated(coding, p, True, Tables()).softmax(scores, 0.3, bias(mask))
    assert spikes.min() == spikes[0, 0, 5] == 0


@compiles
def test_a_bias_may_be_one_of_all_rows_of_a_batch():
    p, generator = params(GATED), torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(3, 2, 60, 60, generator=generator)
    one = bias(torch.ones(60, 60).tril().bool()[None, None])
    use_compiler(True)
    site = Tabulated(GATED, p, True, Tables())
    expected, count = site.softmax(scores.clone(), 0.3, one.expand(3, 1, 60, 60).contiguous())
    found, spikes = site.softmax(scores.clone(), 0.3, one)
    near = ~torch.isclose(found, expected, rtol=1e-5)  # next to a breakpoint
    assert near.float().mean() < 1e-3
    sure = ~near.any(-1)
    assert torch.equal(spikes[sure], count[sure])


@pytest.mark.parametrize(
    "compiler", [False, pytest.param(True, marks=compiles)], ids=["NumPy", "C++"]
)
def test_a_table_is_made_where_it_pays(compiler):
    use_compiler(compiler)
    p = params(GATED)
    token, text = values(1, torch.float32, 1), values(1, torch.float32)
    sites = Tables()
    one, other = (Tabulated(GATED, p, False, sites) for _ in range(2))
    for _ in range(TABLE_AFTER - 1):
        assert one.rows(token, p) is None
    expected = GATED.quantise(token, p)[0]
    assert torch.equal(one.rows(token, p)[0], expected)
    assert torch.equal(other.rows(token, p)[0], expected)  # made with that of the first
    long = Tabulated(GATED, p, False, Tables()).rows(text, p)
    assert (long is not None) == compiler  # NumPy would take longer than the expression
    assert (one.rows(text, p) is not None) == compiler
    tokenwise = Integer(bits=4)
    own = site_params(fitted(tokenwise), 0)
    assert Tabulated(tokenwise, own, False, Tables()).rows(text, own) is None
    learns = text.clone().requires_grad_()
    assert one.rows(learns, p) is None and one.rows(learns.detach()[:, :1], p) is not None


@compiles
def test_threads_that_pass_one_model_wait_for_its_tables(monkeypatch):
    use_compiler(True)
    monkeypatch.setattr(tables, "_MADE", {})
    p, x, found = params(GATED), values(1, torch.float32), []
    sites = Tables()
    every = [Tabulated(GATED, p, False, sites) for _ in range(8)]
    threads = [threading.Thread(target=lambda s=s: found.append(s.rows(x, p)[0])) for s in every]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(torch.equal(each, found[0]) for each in found)


@compiles
def test_tables_of_many_models_are_forgotten_and_a_copy_codes_as_the_first(monkeypatch):
    use_compiler(True)
    kept = {}
    monkeypatch.setattr(tables, "_MADE", kept)
    monkeypatch.setattr(tables, "MOST_MADE", 2)
    x = values(1, torch.float32)
    for steps in (2, 3, 4):
        coding = Gated("gated", steps, 2)
        p = params(coding)
        site = Tabulated(coding, p, False, Tables())
        first = site.rows(x, p)[0]
        assert torch.equal(first, coding.quantise(x, p)[0])
        scores, value = torch.randn(1, 2, 128, 128), torch.randn(1, 2, 128, 8)
        assert site.attend(scores, 1.0, None, value, torch.empty(1, 128, 2, 8)) is not None
        assert torch.equal(copy.deepcopy(site).rows(x, p)[0], first)
        assert len(kept) <= 2


@compiles
@pytest.mark.parametrize("name", ["channel", "centre"])
def test_channels_need_not_lie_side_by_side(name):
    p, x = params(GATED, (name,)), values(1, torch.float32, 200)[..., :90]
    expected, _ = row_kernel(GATED, False)(x, p)
    use_compiler(True)
    apart = p | {name: torch.stack([p[name], -p[name]], 1)[:, 0]}
    assert torch.equal(Tabulated(GATED, apart, False, Tables()).rows(x, apart)[0], expected)


@compiles
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_no_default_dtype_changes_a_code(default):
    p, x = params(GATED), values(1, torch.float32, ALONE // WIDTH + 1)
    expected, _ = row_kernel(GATED, False)(x, p)
    use_compiler(True)
    site = Tabulated(GATED, p, False, Tables())
    site._tables.make()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(site.rows(x, p)[0], expected)
    finally:
        torch.set_default_dtype(before)


@compiles
@pytest.mark.parametrize(
    "made",
    [torch.Tensor.double, torch.Tensor.bfloat16, torch.nn.Parameter],
    ids=lambda m: m.__name__,
)
def test_parameters_that_no_table_is_of_are_left_to_the_expression(made):
    use_compiler(True)
    p, x = params(GATED), values(1, torch.float32, 4)
    whole = [name for name, value in p.items() if not value.is_floating_point()]
    p = {name: value if name in whole else made(value) for name, value in p.items()}
    port = SpikingPort(GATED, p)
    for _ in range(TABLE_AFTER + 1):
        assert torch.equal(port(x, None, 1), GATED.quantise(x, p)[0].float())


@compiles
@pytest.mark.parametrize("rows", [8, EAGER_BELOW // WIDTH + 1], ids=["few", "many"])
def test_a_trace_and_a_tensor_without_memory_go_by_the_expression(rows):
    use_compiler(True)
    p, x = params(GATED), values(1, torch.float32, rows)
    site = Tabulated(GATED, p, False, Tables())
    site._tables.make()
    answers = []
    torch.jit.trace(lambda x: answers.append(site.rows(x, p)) or x, x, check_trace=False)
    with FakeTensorMode() as mode:
        answers.append(site.rows(mode.from_tensor(x), p))
    assert answers == [None, None] and site.rows(x, p) is not None
