"""The compiled search against the table that it reads, bit for bit."""

import logging
import shutil

import pytest
import torch

from stages import compiler
from stages.codings.base import site_params
from stages.codings.gated import Gated
from stages.codings.phase import Phase
from stages.codings.rate import Rate
from stages.compiler import use_compiler
from stages.neurons.channels import unscaled
from stages.neurons.lookup import lookups
from stages.neurons.search import search
from tests.codings.reference import fitted
from tests.ports.biases import bias

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
CODINGS = [
    Gated("gated", 6, 2),
    Gated("gated", 4, 3, offset=True),
    Phase("phase", 6),
    Rate("rate", 3),
]


def bits(x):
    return x.contiguous().view(torch.int32)


def made(coding):
    """The table of a site and its compiled search."""
    (table,) = lookups(coding, [unscaled(site_params(fitted(coding), 0))])
    use_compiler(True)
    compiled = search(table.edge, table.value)
    assert compiled is not None
    return table, compiled


def near(edges):
    """Edges and the float32 values on both sides of them."""
    up = torch.full_like(edges, torch.inf)
    return torch.cat([edges, edges.nextafter(up), edges.nextafter(-up)])


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: f"{coding.name}{coding.timesteps}")
def test_a_compiled_search_gives_the_bits_of_the_table(coding):
    table, compiled = made(coding)
    ends = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
    drawn = 8 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([near(table.edge), ends, drawn])
    for size in (1, 63, 64, 65, len(x)):
        given = x[-size:].clone()
        assert torch.equal(bits(compiled.values(given)), bits(table(given)[0]))
        assert torch.equal(bits(given), bits(x[-size:]))  # what is coded stays
    assert len(compiled.values(x).unique()) > 4


@pytest.mark.parametrize("first", [0, 3, 4])
def test_new_tokens_are_coded_in_their_place(first):
    table, compiled = made(CODINGS[0])
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = x.clone()
    expected[:, :, first:] = table(x[:, :, first:])[0]
    assert compiled.replace(x, first)
    assert torch.equal(x, expected)


def test_a_softmax_of_one_query_is_coded_with_the_bits_of_its_operations():
    table, compiled = made(Gated("gated", 6, 2))
    generator = torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(2, 3, 1, 70, generator=generator)
    mask = torch.rand(2, 1, 1, 70, generator=generator) < 0.8
    given = bias(mask)
    logits = scores * 0.3 + given
    power = torch.exp(logits - logits.amax(-1, keepdim=True))
    expected = table(power / power.sum(-1, keepdim=True))[0]
    coded = compiled.softmax(scores, 0.3, given)
    assert coded.data_ptr() == scores.data_ptr()
    assert torch.equal(bits(coded), bits(expected))
    assert coded.count_nonzero() > 8 and not coded.masked_select(~mask).any()


def test_what_is_not_float32_in_one_piece_is_left_to_the_table():
    _, compiled = made(CODINGS[0])
    x = torch.randn(1, 2, 4, 6)
    for other in (x.bfloat16(), x.double(), x.transpose(1, 2)):
        assert compiled.values(other) is None and not compiled.replace(other, 0)
    assert compiled.softmax(x, 1.0, x[:, :1]) is None  # four queries
    one = torch.randn(2, 2, 1, 6)
    assert compiled.softmax(one, 1.0, one[:1, :1]) is None  # a bias of one row for two


def test_a_trace_of_the_model_is_left_to_the_table():
    """torch.compile gives other values where it is not."""
    _, compiled = made(CODINGS[0])
    x = torch.randn(1, 2, 1, 6)

    def asked(x):
        y = x + 1
        return compiled.values(y), compiled.replace(y, 0), compiled.softmax(y, 1.0, y[:, :1])

    assert torch.compile(asked, backend="eager")(x) == (None, False, None)
    assert torch.is_tensor(asked(x)[0])


def test_without_a_compiler_there_is_no_search(monkeypatch, caplog):
    table, _ = made(CODINGS[0])
    use_compiler(False)
    assert search(table.edge, table.value) is None
    use_compiler(True)
    monkeypatch.setenv("CXX", "false")
    compiler._built.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert search(table.edge, table.value) is None
        assert search(table.edge, table.value) is None
    assert caplog.text.count("NumPy") == 1  # said once
    compiler._built.cache_clear()
