"""A cache keeps the codes of keys and values, so that a token is coded once."""

import copy
import shutil

import pytest
import torch
from transformers import DynamicCache

from stages.codings.base import site_params
from stages.codings.gated import Gated
from stages.codings.integer import Integer
from stages.compiler import use_compiler
from stages.errors import InputError
from stages.model.sites import find_sites
from stages.neurons.selection import Selection
from stages.neurons.stairs import Stairs
from stages.ports import kernels, passes, port
from stages.ports.counters import Counters
from stages.ports.patched import patched

CODING = Gated("gated", 4, 2)


@torch.no_grad()
def in_chunks(model, ids, sizes, cache=None):
    """Logits of ids fed piece by piece on a growing cache, and that cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts, start = [], 0
    for size in sizes:
        out = model(ids[:, start : start + size], cache=cache, use_cache=True)
        start += size
        parts.append(out.logits)
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("coding", [CODING, Integer(bits=8)], ids=["site", "token"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_kept_codes_give_the_logits_of_codes_made_anew(
    tiny, tokens, convert, monkeypatch, kind, coding
):
    model, ids = tiny(kind), tokens(2, 14)
    sizes = (6, 1, 4, 1, 1, 1)
    with patched(model, convert(model, coding)):
        kept, cache = in_chunks(model, ids, sizes)
        monkeypatch.setattr(passes, "_grows", lambda cache: False)
        anew, dense = in_chunks(model, ids, sizes)
    torch.testing.assert_close(kept, anew, rtol=1e-5, atol=1e-5)
    same = torch.equal(cache.layers[0].keys, dense.layers[0].keys)
    assert same == coding.tokenwise  # codes that depend on the whole token are not kept


def test_only_new_tokens_are_coded(model, tokens, convert, monkeypatch):
    rows = []
    original = kernels.row_kernel

    def spied(coding, counted):
        kernel = original(coding, counted)

        def call(x, p):
            rows.append(tuple(x.shape))
            return kernel(x, p)

        return call

    monkeypatch.setattr(port, "row_kernel", spied)
    with patched(model, convert(model, CODING, ("attn.k",))):
        in_chunks(model, tokens(1, 9), (6, 2, 1))
    lengths = [shape[2] for shape in rows]
    layers = model.config.num_hidden_layers
    assert lengths == [6] * layers + [2] * layers + [1] * layers


def test_counters_refuse_a_cache_of_codes(model, tokens, convert):
    conversion, ids = convert(model, CODING), tokens(1, 8)
    with patched(model, conversion):
        _, cache = in_chunks(model, ids, (8,))
    counters = Counters(find_sites(model), "cpu")
    with patched(model, conversion, counters), pytest.raises(InputError, match="empty one"):
        in_chunks(model, ids, (1,), cache)


def test_neurons_refuse_a_cache_of_other_codes_and_a_copy_of_it(model, tokens, convert):
    ids = tokens(1, 8)
    with patched(model, convert(model, CODING)):
        _, cache = in_chunks(model, ids, (8,))
        in_chunks(model, ids, (1,), copy.deepcopy(cache))
    with patched(model, convert(model, Gated("gated", 3, 1))):
        for each in (cache, copy.deepcopy(cache)):
            with pytest.raises(InputError, match="other neurons"):
                in_chunks(model, ids, (1,), each)


@torch.no_grad()
def test_a_cache_that_the_model_makes_is_coded_by_the_second_pass(model, tokens, convert):
    ids = tokens(1, 8)
    with patched(model, convert(model, CODING)):
        expected, _ = in_chunks(model, ids, (6, 1, 1))
        first = model(ids[:, :6], use_cache=True)
        rest, _ = in_chunks(model, ids[:, 6:], (1, 1), first.cache)
    torch.testing.assert_close(rest, expected[:, 6:], rtol=1e-5, atol=1e-5)


def test_a_shortened_cache_goes_on(model, tokens, convert):
    """As assisted generation does with tokens that it does not take."""
    ids = tokens(1, 12)
    with patched(model, convert(model, CODING)):
        whole, _ = in_chunks(model, ids, (8, 1, 1, 2))
        _, cache = in_chunks(model, torch.cat([ids[:, :8], ids[:, :3]], 1), (8, 3))
        cache.crop(-3)
        rest, _ = in_chunks(model, ids[:, 8:], (1, 1, 2), cache)
    torch.testing.assert_close(rest, whole[:, 8:], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("rows", [1, 2])
def test_single_tokens_by_a_compiled_search_have_the_logits_of_the_table(
    model, tokens, convert, rows
):
    conversion, ids = convert(model, CODING), tokens(rows, 40)
    sizes = (6, *34 * [1])
    with patched(model, conversion):
        table, _ = in_chunks(model, ids, sizes)
    use_compiler(True)
    searched = []
    with patched(model, conversion), pytest.MonkeyPatch.context() as patch:
        for kind, name in ((Stairs, "values"), (Stairs, "rows"), (Selection, "__call__")):
            patch.setattr(kind, name, spied(getattr(kind, name), searched))
        compiled, _ = in_chunks(model, ids, sizes)
    torch.testing.assert_close(compiled, table, rtol=1e-4, atol=1e-5)
    assert set(searched) == {"values", "rows", "__call__"}


def spied(method, names):
    def call(*args, **kwargs):
        names.append(method.__name__)
        return method(*args, **kwargs)

    return call


def test_a_traced_port_whose_code_is_a_table_gives_its_values(model, convert):
    coding, neurons = CODING, convert(model, CODING).neurons
    spiking = port.SpikingPort(coding, site_params(neurons.fit.params, 0))
    x = torch.randn(10, 1, 1, 32, generator=torch.Generator().manual_seed(0))
    expected = [spiking(token, None, 0) for token in x]  # the last ones by the table
    traced = torch.compile(lambda token: spiking(token + 0, None, 0), backend="eager")
    assert torch.equal(torch.stack([traced(token) for token in x]), torch.stack(expected))
