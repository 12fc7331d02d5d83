"""The compiled table against the one in NumPy, bit for bit."""

import logging
import shutil

import pytest
import torch

from stages import compiler
from stages.codings.base import site_params
from stages.codings.gated import Gated
from stages.codings.lloyd_max import LloydMax
from stages.compiler import use_compiler
from stages.neurons.channels import unscaled
from stages.neurons.lookup import Lookup, lookups
from stages.neurons.stairs import ALONE, LEAST_OPEN, stairs
from tests.codings.reference import fitted, shipped

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
GATED = Gated("gated", 6, 2)
CODINGS = shipped() | {
    "gated_offset": Gated("gated", 4, 3, offset=True),
    "gated_of_many": Gated("gated", 10, 2),  # of which two lie in a bucket
    "lloyd_max": LloydMax(timesteps=4),
}


@pytest.fixture(autouse=True)
def compiler_on():
    use_compiler(True)


def bits(x):
    return x.contiguous().view(torch.int32)


def made(coding):
    """The table of a site and what is compiled of it."""
    coding, own = coding.at_site(unscaled(site_params(fitted(coding), 0)))
    (table,) = lookups(coding, [own])
    return table, stairs(table)


@pytest.fixture(scope="module")
def gated():
    use_compiler(True)
    return made(GATED)


def near(edges):
    """Edges and the float32 values on both sides of them."""
    up = torch.full_like(edges, torch.inf)
    return torch.cat([edges, edges.nextafter(up), edges.nextafter(-up)])


def values(table):
    ends = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38]
    strange = [torch.inf, -torch.inf, torch.nan, -torch.nan]
    generator = torch.Generator().manual_seed(0)
    drawn = 8 * torch.randn(1000, generator=generator)
    small = drawn * torch.exp2(-40 * torch.rand(1000, generator=generator))
    return torch.cat([near(table.edge), torch.tensor(ends + strange), drawn, small])


@pytest.mark.parametrize("name", CODINGS)
def test_compiled_stairs_give_the_bits_and_the_spikes_of_the_table(name):
    table, compiled = made(CODINGS[name])
    x = values(table)
    for size in (1, 63, 64, 65, len(x)):
        given = x[-size:].clone()
        value, stair = table(given)
        assert torch.equal(bits(compiled.values(given)), bits(value))
        out = torch.empty_like(given)
        fired = compiled.rows(given, out, counted=True)
        assert torch.equal(bits(out), bits(value)) and fired.dim() == 0
        assert fired == table.spikes[stair].sum()
        assert torch.equal(bits(given), bits(x[-size:]))  # what is coded stays
    assert len(value.unique()) > 4
    assert compiled.table.twice == (name == "gated_of_many")
    assert compiled.zero == table(torch.zeros(1))[0]
    assert compiled.spikes_of_zero == table.spikes[table(torch.zeros(1))[1]]


def expected(table, x, scale, mean):
    """In units [H, 1, D] or [C] and about means of heads, which are left out, or of features."""
    u = x if mean is None else x - mean
    value, stair = table(u if scale is None else u / scale)
    value = value if scale is None else value * scale
    value = value + mean if mean is not None and x.dim() != 4 else value
    return value, table.spikes[stair].sum(-1)


@pytest.mark.parametrize("about", [False, True], ids=["", "means"])
@pytest.mark.parametrize("units", [False, True], ids=["", "scales"])
@pytest.mark.parametrize("heads", [1, 3])
def test_rows_are_coded_about_means_and_in_units_of_channels(gated, heads, units, about):
    table, compiled = gated
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, heads * 70, generator=generator)
    scale = torch.rand(x.shape[-1], generator=generator) + 0.1 if units else None
    mean = torch.randn(x.shape[-1], generator=generator) if about else None
    given, channels = x, [scale, mean]
    if heads > 1:  # as the model lays them out, not side by side
        given = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        channels = [None if c is None else c.view(heads, 1, -1) for c in channels]
    value, count = expected(table, given, *channels)
    out = torch.empty(given.shape)
    fired = compiled.rows(given, out, scale, mean, True)
    assert torch.equal(bits(out), bits(value)) and torch.equal(fired, count)
    assert compiled.rows(given, given, scale, mean) is None  # in their place
    assert torch.equal(bits(given), bits(value)) and len(value.unique()) > 20


def test_rows_of_a_part_are_coded_in_their_place(gated):
    table, compiled = gated
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    value = x.clone()
    value[:, :, 3:] = table(x[:, :, 3:])[0]
    compiled.rows(x[:, :, 3:], x[:, :, 3:])
    assert torch.equal(x, value)


def test_no_values_and_threads_give_the_same_bits(gated):
    table, compiled = gated
    compiled.rows(torch.empty(0, 5), torch.empty(0, 5))
    x, before = torch.randn(ALONE // 100, 200), torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = torch.empty_like(x)
        fired = compiled.rows(x, out, counted=True)
        value, stair = table(x)
        assert torch.equal(out, value) and torch.equal(fired, table.spikes[stair].sum(-1))
    torch.set_num_threads(before)


def narrow(edges):
    edge = torch.tensor([*edges, torch.inf])
    level = torch.arange(len(edge) + 1).float()
    return Lookup(edge, level, torch.zeros_like(level))


def test_stairs_that_are_too_narrow_for_buckets_are_left_to_the_table():
    up = 2.0**-23
    assert stairs(narrow([1.0, 1 + up, 1 + 2 * up])) is None
    assert stairs(narrow([-3e-45, -1e-45, 0.0, 1e-45])) is not None  # two of a sign in one
    assert stairs(narrow([-4e-45, -3e-45, -1e-45])) is None
    assert stairs(narrow([1e-30, 1.0, 1 + 2.0**-19, 1 + 2.0**-18])) is None  # too many buckets
    few = [[], [0.0], [-1e-45, 0.0], [-1.0, 1.0], [1.0, 1 + up], [-1 - up, -1.0, 1.0, 1 + 9 * up]]
    for edges in [*few, [1.0, 1 + up, 1 + 2.0 ** (LEAST_OPEN - 21)], [-3e-45, -1e-45, 1e-45]]:
        table = narrow(edges)
        x = values(table)
        assert torch.equal(bits(stairs(table).values(x)), bits(table(x)[0]))


def test_without_a_compiler_there_are_no_stairs(monkeypatch, caplog, gated):
    table, _ = gated
    use_compiler(False)
    assert stairs(table) is None
    use_compiler(True)
    monkeypatch.setenv("CXX", "false")
    compiler._built.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert stairs(table) is None
        assert stairs(table) is None
    assert caplog.text.count("NumPy") == 1  # said once
    compiler._built.cache_clear()
