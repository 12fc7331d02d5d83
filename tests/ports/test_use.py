"""What a user does to a loaded spiking model keeps its neurons, or says in one line that it cannot."""

from __future__ import annotations

import copy
import io
import pickle
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import stages
from stages.checkpoint.folder import save
from stages.codings.gated import Gated
from stages.errors import InputError
from stages.ports.attachment import attachment
from stages.ports.patched import patched
from stages.transforms.search import PrefixSearch
from stages.transforms.transform import RotatePrefix, Untouched, applied

GATED = Gated("gated", 4, 2)
PREFIX = (7, 3, 48)
# Grouped heads; a sliding window and caches of two kinds; experts; a prefix and a rotation.
MODELS = {"llama": (), "gemma3_text": (), "qwen3_moe": (), "llama behind a prefix": PREFIX}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny, convert):
    @lru_cache
    def make(name: str) -> Path:
        model, prefix, transform = tiny(name.split()[0]), MODELS[name], Untouched()
        if prefix:
            transform = RotatePrefix("rotate_prefix", 3, PrefixSearch(64))
            transform.apply(model, prefix)
        folder = tmp_path_factory.mktemp("use") / "spiking"
        save(model, convert(model, GATED), transform, prefix, folder)
        return folder

    return make


@pytest.fixture(params=MODELS)
def loaded(request, folders):
    return stages.load(folders(request.param))


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def refused(use, *words):
    """Whether `use` ends in one line that has all the words."""
    with pytest.raises(InputError) as error, torch.no_grad():
        use()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# Implementations of attention and experts


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_another_attention_is_refused_until_it_is_set_back(loaded, tokens, name):
    ids = tokens(2, 11)
    before = logits(loaded, ids)
    for use in (loaded.set_attn_implementation, loaded.get_decoder().set_attn_implementation):
        refused(partial(use, name), f"set_attn_implementation({name!r}) would leave out neurons")
        refused(partial(use, attn_implementation=name), f"({name!r}) would leave out neurons")
        refused(partial(use, {"": name}), "would leave out neurons")
        assert torch.equal(logits(loaded, ids), before)
    for change in (
        lambda: setattr(loaded.config, "_attn_implementation", name),
        lambda: setattr(loaded.get_decoder().config, "_attn_implementation", name),
    ):
        change()
        back = "model.set_attn_implementation('ported') sets it back"
        refused(lambda: loaded(ids), f"attn_implementation={name!r}", back)
        refused(lambda: loaded.get_decoder()(ids), back)
        refused(lambda: loaded.generate(ids, max_new_tokens=2), back)
        loaded.set_attn_implementation("ported")
        assert torch.equal(logits(loaded, ids), before)
    loaded.config._attn_implementation = name
    bound = attachment(loaded)
    assert bound is not None
    bound.close()
    loaded.set_attn_implementation(name)  # a dense model may have any
    assert not torch.equal(logits(loaded, ids), before)


def test_other_experts_are_refused(folders, tokens):
    model, ids = stages.load(folders("qwen3_moe")), tokens(2, 11)
    before = logits(model, ids)
    refused(lambda: model.set_experts_implementation("eager"), "would leave out neurons")
    assert torch.equal(logits(model, ids), before)
    model.config._experts_implementation = "eager"
    refused(lambda: model(ids), "model.set_experts_implementation('ported') sets it back")
    model.set_experts_implementation("ported")
    assert torch.equal(logits(model, ids), before)


def test_another_attention_is_refused_inside_a_patch(tiny, tokens, convert):
    model, ids = tiny(), tokens(2, 11)
    dense, conversion = logits(model, ids), convert(model, GATED)
    with patched(model, conversion):
        refused(lambda: model.set_attn_implementation("sdpa"), "would leave out neurons")
        model.config._attn_implementation = "sdpa"
        refused(lambda: model(ids), "attn_implementation='sdpa' would leave out neurons")
    assert torch.equal(logits(model, ids), dense)


def test_a_module_put_in_the_place_of_one_with_neurons_is_refused(loaded, tokens):
    ids = tokens(2, 11)
    before, head = logits(loaded, ids), loaded.lm_head
    layer = loaded.get_decoder().layers[1]
    norm, projected = layer.input_layernorm, layer.self_attn.o_proj
    for above, name, module in (
        (loaded, "lm_head", head),
        (layer, "input_layernorm", norm),
        (layer.self_attn, "o_proj", projected),
        (layer, "self_attn", layer.self_attn),
    ):
        setattr(above, name, nn.Sequential(module))  # computes the same, behind another path
        words = ("was replaced", "stages.restore(model)", name)
        refused(lambda: loaded(ids), *words)
        refused(lambda: loaded.generate(ids, max_new_tokens=2), *words)
        setattr(above, name, module)
        assert torch.equal(logits(loaded, ids), before)


def test_an_embedding_of_more_tokens_has_a_head_without_neurons(tiny, convert, tmp_path, tokens):
    """transformers makes a new head, of which the hooks of the old one know nothing."""
    model, ids = tiny(), tokens(2, 11)
    save(model, convert(model, GATED), Untouched(), (), tmp_path / "all")
    loaded = stages.load(tmp_path / "all")
    loaded.resize_token_embeddings(60)
    refused(lambda: loaded(ids), "lm_head of this model was replaced")
    body = convert(model, GATED, ("attn.in", "mlp.down"))
    save(model, body, Untouched(), (), tmp_path / "body")
    loaded = stages.load(tmp_path / "body")
    before = logits(loaded, ids)
    loaded.resize_token_embeddings(60)  # no neuron is lost
    torch.testing.assert_close(logits(loaded, ids)[..., :50], before)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_attention_asked_of_from_pretrained_is_that_of_the_dense_model(folders, tokens, name):
    ids = tokens(2, 11)
    model = stages.load(folders("llama"), attn_implementation=name)
    assert torch.equal(logits(model, ids), logits(stages.load(folders("llama")), ids))
    attachment(model).close()
    assert model.config._attn_implementation == name


# Neurons off, and others on


def test_a_restored_model_keeps_its_transform_in_what_is_saved_of_it(loaded, tokens, tmp_path):
    ids = tokens(2, 11)
    stages.restore(loaded)
    dense = logits(loaded, ids)
    if isinstance(applied(loaded), RotatePrefix):  # weights alone would be another model
        with pytest.raises(InputError, match=r"stages\.convert gives it neurons"):
            loaded.save_pretrained(tmp_path / "dense")
        assert not (tmp_path / "dense").exists()
    else:
        loaded.save_pretrained(tmp_path / "dense")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert torch.allclose(logits(again, ids), dense, atol=1e-4)
    stages.convert(loaded, tokens(4, 16, seed=1), stages.SignedDigit(timesteps=5, grains=2))
    spiking = logits(loaded, ids)
    assert not torch.equal(spiking, dense)
    stages.save(loaded, tmp_path / "again")
    assert torch.equal(logits(stages.load(tmp_path / "again"), ids), spiking)


# Copies


def test_a_deep_copy_is_an_independent_spiking_model(loaded, tokens, tmp_path):
    ids = tokens(2, 11)
    before, held = logits(loaded, ids), attachment(loaded)
    twin = copy.deepcopy(loaded)
    assert torch.equal(logits(twin, ids), before) and torch.equal(logits(loaded, ids), before)
    shared = {p.data_ptr() for p in loaded.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert not shared
    twin.spiking_neurons.scale.mul_(2)
    changed = logits(twin, ids)
    assert not torch.equal(changed, before) and torch.equal(logits(loaded, ids), before)
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(logits(stages.load(tmp_path / "twin"), ids), changed)
    attachment(twin).close()
    assert torch.equal(logits(loaded, ids), before)
    held.close()  # what was held of the first before it was copied still takes its neurons off
    assert attachment(loaded) is None
    assert torch.equal(logits(loaded, ids), logits(twin, ids))
    assert not torch.equal(logits(loaded, ids), before)


def test_a_copy_inside_of_another_module_keeps_its_neurons(folders, tokens):
    model, ids = stages.load(folders("llama behind a prefix")), tokens(2, 11)
    outer = copy.deepcopy(nn.ModuleDict({"spiking": model}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    fresh = stages.load(folders("llama behind a prefix"))
    assert torch.equal(logits(outer["spiking"], ids), logits(fresh, ids))


def test_a_spiking_model_is_not_pickled(loaded):
    words = ("model.save_pretrained(folder)", "stages.load(folder)")
    refused(lambda: pickle.dumps(loaded), *words)
    refused(lambda: torch.save(loaded, io.BytesIO()), *words)


def test_a_patched_model_is_copied_outside(tiny, tokens, convert):
    model, ids = tiny(), tokens(2, 11)
    with patched(model, convert(model, GATED)):
        refused(lambda: copy.deepcopy(model), "not copied while its sites are patched")
        refused(lambda: pickle.dumps(model), "not pickled")
    assert torch.equal(logits(copy.deepcopy(model), ids), logits(model, ids))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids), logits(model, ids))


def test_a_state_dict_has_weights_and_neurons(folders, tokens):
    model, other = (stages.load(folders("llama")) for _ in range(2))
    ids = tokens(2, 11)
    with torch.no_grad():
        for value in other.state_dict().values():
            value.mul_(0.5)
    assert not torch.equal(logits(other, ids), logits(model, ids))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), logits(model, ids))


# Parts and generation


def test_the_decoder_of_a_model_is_coded_and_one_without_a_head_is_refused(loaded, tokens, folders):
    ids = tokens(2, 11)
    with torch.no_grad():
        hidden = loaded.get_decoder()(ids).last_hidden_state
        assert torch.equal(loaded.lm_head(hidden), logits(loaded, ids))
    refused(lambda: AutoModel.from_pretrained(folders("llama")), "has no head", "stages.load")


LEFT = torch.tensor([[0, 0, 0] + [1] * 8, [1] * 11])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_every_cache_generates_the_same(folders, tokens, name, options):
    model, ids = stages.load(folders(name)), tokens(2, 11)
    fixed = {"max_new_tokens": 9, "do_sample": False, "attention_mask": LEFT} | options
    want = model.generate(ids, use_cache=False, **fixed)
    assert torch.equal(model.generate(ids, **fixed), want)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **fixed)
    assert torch.equal(static, want)
    attachment(model).close()
    assert not torch.equal(model.generate(ids, **fixed), want)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_drafts_change_no_token(folders, tokens, name):
    model, ids = stages.load(folders(name)), tokens(1, 11)
    fixed = {"max_new_tokens": 9, "do_sample": False}
    want = model.generate(ids, **fixed)
    drafted = copy.deepcopy(model)
    assert torch.equal(model.generate(ids, assistant_model=drafted, **fixed), want)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **fixed), want)


def test_behind_a_prefix_what_has_no_place_for_it_is_refused(folders, tokens):
    model, ids = stages.load(folders("llama behind a prefix")), tokens(1, 11)
    fixed = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = model.generate(ids, **fixed)
    assert torch.equal(model.generate(ids, use_cache=False, **fixed), want)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **fixed), want)
    refused(
        lambda: model.generate(ids, cache_implementation="static", disable_compile=True, **fixed),
        "no cache of a fixed size",
    )
    refused(
        lambda: model.generate(ids, assistant_model=copy.deepcopy(model), **fixed),
        "of an assistant model",
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [12, 60])
def test_a_short_text_beside_a_long_one_has_the_logits_it_has_alone(loaded, tokens, side, length):
    short, ids = tokens(1, 5), tokens(2, length, seed=3)
    mask = torch.ones(2, length, dtype=torch.long)
    real = slice(length - 5, None) if side == "left" else slice(0, 5)
    ids[0], mask[0], ids[0, real], mask[0, real] = 49, 0, short[0], 1
    want = logits(loaded, short)[0]
    for given in ({}, {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}):
        got = logits(loaded, ids, attention_mask=mask, **given)[0, real]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
