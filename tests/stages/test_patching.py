"""The spiking model against one of stepped neurons, what patching leaves behind, and live errors."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from stages.codings.base import site_params
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.codings.lloyd_max import LloydMax
from stages.codings.multigrain import Multigrain
from stages.compiler import compiled, use_compiler
from stages.errors import InputError
from stages.fitted import Conversion, Fit
from stages.model.sites import ROLES, find_sites
from stages.neurons.bank import bank_quantise
from stages.neurons.spikes import decode
from stages.patching import Patching
from stages.ports import tables
from stages.ports.hooks import attached
from stages.ports.patched import patched

CODINGS = [
    Las("las", 5, "zero"),
    Las("las_rounded", 5, "half_step"),
    Multigrain("multigrain", 5, 2, "half_step", False),
    Gated("gated2", 4, 2),
    Gated("gated3", 4, 3),
]
ROUNDED = CODINGS[1]


class Stepped:
    """Encodes with the time-stepped neuron, decodes with its table, and remembers both sides."""

    plain = whole = False

    def __init__(self, coding, params, passes_on=True):
        self.coding, self.params, self.passes_on = coding, params, passes_on
        self.pairs = []

    def __call__(self, x, real, fanout):
        spikes = self.coding.encode(x, self.params)
        value = decode(spikes, self.coding.table(self.params))
        self.pairs.append((x, value, spikes.count))
        return value if self.passes_on else x

    def constant(self, x):
        return None

    def tally(self, spikes, view, heads, fanout):
        assert spikes is None

    def softmax(self, scores, scaling, view):
        x = (scores * scaling).masked_fill(~view.mask, -1e30).softmax(-1)
        return self(x, None, 0), None


def stepped(model, conversion, passes_on=True):
    """The model with a stepped neuron on every converted site: a context, and its ports."""
    parameters = conversion.neurons.fit.params
    ports = {
        name: Stepped(conversion.coding, site_params(parameters, index), passes_on)
        for index, name in enumerate(conversion.neurons.sites)
    }
    return attached(model, find_sites(model), ports), ports


def batch(tokens, pads):
    """Ids and mask of 3 rows of 10 with pads on the left, on the right or nowhere."""
    ids, mask = tokens(3, 10, seed=4), torch.ones(3, 10, dtype=torch.long)
    for row, count in enumerate((3, 0, 6)):
        mask[row, {"left": slice(0, count), "right": slice(10 - count, 10), "no": []}[pads]] = 0
    return ids, mask


@torch.no_grad()
def logits(model, ids, mask, cached):
    """Logits in one pass, or of 6, 1, 2 and 1 tokens on a cache; those of pads are zero."""
    cache, parts, start = None, [], 0
    for size in (6, 1, 2, 1) if cached else (10,):
        now, start = slice(start, start + size), start + size
        out = model(ids[:, now], attention_mask=mask[:, :start], cache=cache, use_cache=cached)
        cache = out.cache
        parts.append(out.logits)
    return torch.cat(parts, 1) * mask[..., None]


def is_stepped(model, conversion, reference, tokens, pads="left", cached=False):
    """Whether the patched model has the logits of the stepped neurons of `reference`."""
    ids, mask = batch(tokens, pads)
    with stepped(model, reference)[0]:
        expected = logits(model, ids, mask, cached)
    with patched(model, conversion):
        found = logits(model, ids, mask, cached)
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def with_params(conversion, **changes):
    """The conversion with some of its parameters replaced."""
    params = {**conversion.neurons.fit.params, **changes}
    return Conversion(conversion.coding, replace(conversion.neurons, fit=Fit(params)))


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.name)
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
@pytest.mark.parametrize("pads", ["no", "left", "right"])
def test_the_patched_model_is_that_of_stepped_neurons(model, tokens, convert, coding, cached, pads):
    conversion = convert(model, coding)
    assert is_stepped(model, conversion, conversion, tokens, pads, cached)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_other_architectures_are_those_of_stepped_neurons(tiny, tokens, convert, kind):
    model = tiny(kind)
    conversion = convert(model, CODINGS[3])
    assert is_stepped(model, conversion, conversion, tokens, "left", True)


def test_generation_is_that_of_stepped_neurons(model, tokens, convert):
    conversion, (ids, mask) = convert(model, CODINGS[4]), batch(tokens, "left")
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    dense = model.generate(ids, **settings)
    with stepped(model, conversion)[0]:
        expected = model.generate(ids, **settings)
    with patched(model, conversion):
        assert torch.equal(model.generate(ids, **settings), expected)
    assert not torch.equal(expected, dense)


@pytest.mark.slow
def test_compiled_kernels_are_the_stepped_neurons(model, tokens, convert, monkeypatch):
    conversion = convert(model, CODINGS[3])
    monkeypatch.setattr(tables, "EAGER_BELOW", 0)
    use_compiler(True)
    assert is_stepped(model, conversion, conversion, tokens)
    if not compiled():
        pytest.skip("torch.compile does not work here")


@pytest.mark.parametrize("role", ROLES)
def test_doubling_one_scale_fails_the_comparison(model, tokens, convert, role):
    conversion = convert(model, ROUNDED)
    scale = conversion.neurons.fit.params["scale"].clone()
    scale[conversion.neurons.roles.index(role)] *= 2
    assert not is_stepped(model, with_params(conversion, scale=scale), conversion, tokens)


@pytest.mark.parametrize(("a", "b"), [("attn.q", "attn.v"), ("mlp.in", "mlp.down")])
def test_swapping_two_sites_fails_the_comparison(model, tokens, convert, a, b):
    conversion = convert(model, ROUNDED)
    scale, roles = conversion.neurons.fit.params["scale"].clone(), conversion.neurons.roles
    pair = [roles.index(a), roles.index(b)]
    scale[pair] = scale[pair[::-1]]
    assert not is_stepped(model, with_params(conversion, scale=scale), conversion, tokens)


@dataclass(frozen=True)
class FastPathFloors(Las):
    """A coding whose fast path forgot v0."""

    def quantise(self, x, p):
        return bank_quantise(x, p, self.timesteps, 0.0)


def test_a_fast_path_of_another_code_fails_the_comparison(model, tokens, convert):
    broken = convert(model, FastPathFloors("broken", 5, "half_step"))
    assert not is_stepped(model, broken, broken, tokens)


def traces(model):
    """Everything that patching could leave on a model."""
    found = [model.config._attn_implementation]
    for module in model.modules():
        found += [len(module._forward_hooks), len(module._forward_pre_hooks), *vars(module)]
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fault", [False, True])
def test_leaving_the_context_restores_the_model(tiny, tokens, convert, attention, fault):
    model, (ids, mask) = tiny(attention=attention), batch(tokens, "left")
    before, marks = logits(model, ids, mask, False), traces(model)
    assert marks[0] == attention
    conversion = convert(model, ROUNDED)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError) if fault else nullcontext(), patched(model, conversion):
        assert not torch.allclose(logits(model, ids, mask, False), before)
        assert traces(model) != marks
        if fault:
            raise KeyError
    assert torch.equal(logits(model, ids, mask, False), before)
    assert traces(model) == marks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_two_models_can_be_patched_at_once(tiny, tokens, convert):
    models = [tiny("llama", seed=1), tiny("qwen2", seed=2)]
    conversions = [
        convert(model, coding) for model, coding in zip(models, CODINGS[:2], strict=True)
    ]
    ids, mask = batch(tokens, "left")
    expected = []
    for model, conversion in zip(models, conversions, strict=True):
        with patched(model, conversion):
            expected.append(logits(model, ids, mask, False))
    dense = logits(models[0], ids, mask, False)
    with patched(models[0], conversions[0]):
        with patched(models[1], conversions[1]):
            for model, want in zip(models, expected, strict=True):
                assert torch.equal(logits(model, ids, mask, False), want)
        assert torch.equal(logits(models[0], ids, mask, False), expected[0])
    assert torch.equal(logits(models[0], ids, mask, False), dense)


@pytest.mark.parametrize(("roles", "number"), [(ROLES, 21), (("attn.k", "head.in"), 3)])
def test_the_number_of_converted_sites_is_yielded(model, convert, roles, number):
    with patched(model, convert(model, ROUNDED, roles)) as converted:
        assert converted == number
    with patched(model, None) as converted:
        assert converted == 0


def test_sites_that_the_model_lacks_are_refused_and_nothing_is_left(model, convert):
    conversion, marks = convert(model, ROUNDED), traces(model)
    sites = ("model.layers.7.mlp.down_proj:in", *conversion.neurons.sites[1:])
    foreign = replace(conversion, neurons=replace(conversion.neurons, sites=sites))
    empty = replace(conversion, neurons=replace(conversion.neurons, sites=()))
    for bad, message in ((foreign, "1 of them not in this model.*layers.7"), (empty, "0 fitted")):
        with pytest.raises(InputError, match=message), patched(model, bad):
            pass
        with pytest.raises(InputError, match=message):
            Patching().run(model, torch.zeros(1, 4, dtype=torch.long), bad, 1)
    nowhere = attached(model, find_sites(model), {"nowhere:in": Stepped(ROUNDED, {})})
    with pytest.raises(InputError, match="no such site in this model: nowhere:in"), nowhere:
        pass
    assert traces(model) == marks


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.name)
def test_live_errors_are_those_of_the_dense_values(model, tokens, convert, coding):
    conversion, ids = convert(model, coding), tokens(3, 12, seed=9)
    frame = Patching().run(model, ids, conversion, batch=2).set_index("site")
    context, ports = stepped(model, conversion, passes_on=False)
    with context, torch.no_grad():
        dense = model(ids).logits
    assert torch.allclose(dense, model(ids).logits, atol=1e-5)  # the stepped pass coded nothing
    assert list(frame.index) == list(conversion.neurons.sites)
    for name, port in ports.items():
        (x, value, count), row = port.pairs[0], frame.loc[name]
        visible = torch.ones(12, 12).tril() if name.endswith("probs") else torch.ones(x.shape[-2:])
        visible = visible.expand_as(x).double()
        error = ((value.double() - x.double()) ** 2).sum() / (x.double() ** 2).sum()
        assert row["nmse"] == pytest.approx(error.item(), rel=1e-3)
        assert row["values"] == visible.sum()
        assert row["spikes"] == pytest.approx((count * visible).sum().item(), rel=2e-3)


def test_the_frame_of_live_errors(model, tokens, convert):
    conversion, ids = convert(model, ROUNDED, ("attn.q", "mlp.down")), tokens(4, 8, seed=9)
    frame = Patching().run(model, ids, conversion, batch=1)
    assert list(frame.columns) == [
        *("site", "role", "layer", "values", "spikes", "nmse", "nmse_atoms", "bound_db")
    ]
    assert list(frame["role"]) == ["attn.q", "mlp.down"] * 2
    assert list(frame["layer"]) == [0, 0, 1, 1]
    assert list(frame["nmse_atoms"]) == conversion.neurons.nmse.tolist()
    assert list(frame["bound_db"]) == conversion.neurons.bound_db.tolist()
    together = Patching().run(model, ids, conversion, batch=4)
    assert frame["values"].equals(together["values"])
    np.testing.assert_allclose(frame["nmse"], together["nmse"], rtol=1e-3)


def test_a_bound_has_live_errors_but_no_spikes(model, tokens, convert):
    ids = tokens(2, 8, seed=9)
    bound = Patching().run(model, ids, convert(model, LloydMax("lloyd_max", 5)), batch=2)
    neuron = Patching().run(model, ids, convert(model, ROUNDED), batch=2)
    assert bound["spikes"].isna().all()
    assert np.log(bound["nmse"]).mean() < np.log(neuron["nmse"]).mean()


def test_held_out_windows_are_one_at_least():
    with pytest.raises(InputError, match="patching.windows=0"):
        Patching(windows=0)
