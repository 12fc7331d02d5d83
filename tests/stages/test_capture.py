"""Capture: the sketch of every site against histograms of an independent eager forward pass."""

import math
from collections import Counter, defaultdict
from importlib import import_module

import numpy as np
import pytest
import torch

from stages.capture import Capture
from stages.errors import InputError
from stages.model.sites import SiteSelection, find_sites, select
from stages.ports import attention


def values_of(model, ids, monkeypatch):
    """What reaches every site: name -> [rows, channels], and the unmasked probabilities [N]."""
    found, handles = defaultdict(list), []
    modeling = import_module(type(model).__module__)
    eager = modeling.eager_attention_forward
    names = {module: name for name, module in model.named_modules()}

    def recording(module, query, key, value, attention_mask, **kwargs):
        output, weights = eager(module, query, key, value, attention_mask, **kwargs)
        for port, x in (("q", query), ("k", key), ("v", value)):
            found[f"{names[module]}:{port}"].append(x.transpose(1, 2).flatten(2))
        seen = (attention_mask == 0).expand_as(weights)
        found[f"{names[module]}:probs"].append(weights[seen])
        return output, weights

    def hook(name):
        return lambda module, args, x: found[name].append(x)

    def pre_hook(name):
        return lambda module, args: found[name].append(args[0])

    for site in find_sites(model):
        module = model.get_submodule(site.path)
        if site.port == "out":
            handles.append(module.register_forward_hook(hook(site.name)))
        elif site.port == "in":
            handles.append(module.register_forward_pre_hook(pre_hook(site.name)))
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(modeling, "eager_attention_forward", recording)
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        if not name.endswith("probs")
        else torch.cat(parts)
        for name, parts in found.items()
    }


def histogram(x, bits):
    """Counts by (negative, lower edge of the bin): `bits` leading mantissa bits in a binade."""
    x = x.flatten().double().numpy()
    mantissa, exponent = np.frexp(np.abs(x))  # |x| = mantissa * 2^exponent, mantissa in [1/2, 1)
    edge = np.ldexp(np.floor(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)
    edge[np.abs(x) < 2.0**-40] = 0
    return Counter(zip(np.signbit(x).tolist(), edge.tolist(), strict=True))


def sketched(sketches, name):
    """The same from a sketch."""
    index = sketches.sites.index(name)
    start, stop = sketches.tensors["offsets"][index : index + 2].tolist()
    code, count = (sketches.tensors[key][start:stop] for key in ("code", "count"))
    edges = sketches.grid.edges()[code.long() % sketches.grid.magnitudes].tolist()
    negative = (code >= sketches.grid.magnitudes).tolist()
    return Counter(dict(zip(zip(negative, edges, strict=True), count.tolist(), strict=True)))


def assert_same(found, expected):
    """Equal but for the few values that a rounding moves over a bin's edge."""
    assert found.total() == expected.total()
    moved = (found - expected).total()
    assert moved <= 0.002 * expected.total(), f"{moved} of {expected.total()} in other bins"


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("bits", [3, 7])
def test_every_histogram_is_that_of_the_eager_model(tiny, tokens, monkeypatch, kind, bits):
    model, ids = (
        tiny(kind).double(),
        tokens(4, 12),
    )  # float32 sums in another order on each processor
    values = {name: x.float() for name, x in values_of(model, ids, monkeypatch).items()}
    sites = find_sites(model)
    sketches = Capture(bits).run(model, ids, sites, batch=3)
    assert sketches.sites == tuple(site.name for site in sites) and set(values) == {*sketches.sites}
    for name in sketches.sites:
        assert_same(sketched(sketches, name), histogram(values[name], bits))


def test_the_comparison_tells_the_layers_apart(model, tokens, monkeypatch):
    ids, sites = tokens(4, 12), find_sites(model)
    values = values_of(model, ids, monkeypatch)
    sketches = Capture().run(model, ids, sites, batch=4)
    for below, above in zip(sites[:10], sites[10:20], strict=True):
        with pytest.raises(AssertionError):
            assert_same(sketched(sketches, below.name), histogram(values[above.name], 7))


def test_extremes_and_channels_are_those_of_the_eager_model(model, tokens, monkeypatch):
    ids = tokens(4, 12)
    values = values_of(model, ids, monkeypatch)
    sketches = Capture().run(model, ids, find_sites(model), batch=2)
    offsets = sketches.tensors["channel_offsets"]
    close = {"rtol": 1e-4, "atol": 1e-6, "check_dtype": False}
    for index, name in enumerate(sketches.sites):
        x, part = values[name], slice(offsets[index], offsets[index + 1])
        extremes = torch.stack(x.aminmax())
        torch.testing.assert_close(sketches.tensors["range"][index], extremes, rtol=1e-3, atol=0)
        if name.endswith("probs"):
            assert part.start == part.stop
            continue
        torch.testing.assert_close(sketches.tensors["absmax"][part], x.abs().amax(0), **close)
        torch.testing.assert_close(sketches.tensors["square"][part], (x**2).sum(0), **close)


def test_keys_and_values_are_counted_once_a_group_and_probabilities_once_a_visible_key(
    model, tokens
):
    sketches = Capture().run(model, tokens(3, 9), find_sites(model), batch=3)
    sizes = {name: sketched(sketches, name).total() for name in sketches.sites}
    layer = "model.layers.1.self_attn"
    assert sizes[f"{layer}:q"] == 3 * 9 * 4 * 10
    assert sizes[f"{layer}:k"] == sizes[f"{layer}:v"] == 3 * 9 * 2 * 10
    assert sizes[f"{layer}:probs"] == 3 * 4 * (9 * 10 // 2)
    assert not any(edge == 0 for _, edge in sketched(sketches, f"{layer}:probs"))


@pytest.mark.parametrize("change", [{"batch": 1}, {"batch": 5}, {"block": 4}])
def test_neither_batches_nor_query_blocks_matter(model, tokens, monkeypatch, change):
    ids, sites = tokens(5, 10), find_sites(model)
    expected = Capture().run(model, ids, sites, batch=2)
    monkeypatch.setattr(attention, "QUERY_BLOCK", change.get("block", 256))
    found = Capture().run(model, ids, sites, change.get("batch", 2))
    for name in expected.sites:
        assert_same(sketched(found, name), sketched(expected, name))


@pytest.mark.parametrize("role", ["mlp.down", "attn.k", "attn.probs", "head.in"])
def test_any_role_can_be_captured_alone(model, tokens, role):
    ids, sites = tokens(2, 8), find_sites(model)
    chosen = select(sites, SiteSelection((role,)))
    alone = Capture().run(model, ids, chosen, batch=2)
    every = Capture().run(model, ids, sites, batch=2)
    assert alone.sites == tuple(site.name for site in chosen)
    for name in alone.sites:
        assert sketched(alone, name) == sketched(every, name)


def test_a_bfloat16_model_is_held_exactly(tiny, tokens):
    model = tiny("llama").bfloat16()
    sketches = Capture().run(model, tokens(2, 8), find_sites(model), batch=2)
    assert not sketches.tensors["first"].any()  # no value lies between two bins
    finer = Capture(9).run(model, tokens(2, 8), find_sites(model), batch=2)
    for name in sketches.sites:
        assert sketched(sketches, name) == sketched(finer, name)


def test_the_model_is_left_as_it_was(model, tokens):
    ids = tokens(2, 8)
    with torch.no_grad():
        before = model(ids).logits
        Capture().run(model, ids, find_sites(model), batch=2)
        assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_name_their_first_site(model, tokens, bad):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = bad
    message = r"site model\.layers\.1\.mlp\.up_proj:out holds \d+ values that are nan, inf"
    with pytest.raises(InputError, match=message):
        Capture().run(model, tokens(2, 8), find_sites(model), batch=2)


def test_a_site_that_is_never_reached_is_an_error(model, tokens):
    sites = find_sites(model)
    model.config.num_hidden_layers = 1  # the forward pass stops before layer 1
    with pytest.raises(RuntimeError, match="never reached"):
        Capture().run(model, tokens(2, 8), sites, batch=2)


@pytest.mark.parametrize("bits", [0, 13])
def test_the_grid_has_one_to_twelve_bits(bits):
    with pytest.raises(InputError, match=f"mantissa_bits={bits}"):
        Capture(bits)
