"""Loading, casting, sharing and training a spiking model keeps its neurons, or is refused in one line."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

import stages
from stages.codings.gated import Gated
from stages.codings.gif import Gif
from stages.codings.las import Las
from stages.errors import InputError
from stages.model.sites import ROLES
from stages.transforms.search import PrefixSearch
from stages.transforms.transform import RotatePrefix
from tests.model.families import made

GATED = Gated("gated", 4, 2)
FEW = ("attn.k", "attn.probs", "mlp.down")
CODINGS = [GATED, Las("las_rounded", 4, "half_step")]
KINDS = ["llama", "gpt2"]  # gpt2: Conv1D, learned positions, a head that is the embedding
PREFIX = (7, 3, 48)


@pytest.fixture
def dense(tiny):
    return lambda kind, **more: made(kind, **more) if kind == "gpt2" else tiny(kind, **more)


@pytest.fixture
def spiking(dense, convert):
    def make(kind, coding=GATED, roles=ROLES, **more):
        model = dense(kind, **more)
        return stages.bind(model, convert(model, coding, roles))

    return make


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


def text(model, ids):
    """Tokens of which each is coded by itself: by the tenth their codes are read from tables."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)


def refused(use, *words):
    with pytest.raises(InputError) as error:
        use()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# State dicts


@pytest.mark.parametrize(("coding", "assign"), [(CODINGS[0], True), (CODINGS[1], False)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_state_dict_brings_its_neurons_also_where_codes_are_tables(
    spiking, tokens, kind, coding, assign
):
    model, source = (spiking(kind, coding, FEW) for _ in range(2))
    ids = tokens(2, 11)
    with torch.no_grad():
        for name, value in source.state_dict().items():
            if value.is_floating_point():
                value.mul_(1.7 if "spiking_neurons" in name else 0.9)
    before, want = logits(model, ids), logits(source, ids)
    written = text(source, ids[:, :3])
    text(model, ids[:, :3])  # tables of the former codes are made
    assert not torch.allclose(before, want, atol=1e-2)
    model.load_state_dict(through_a_file(source.state_dict()), assign=assign)
    assert torch.equal(logits(model, ids), want)
    assert torch.equal(text(model, ids[:, :3]), written)
    assert stages.table(model).equals(stages.table(source))
    stages.restore(model)
    assert torch.equal(logits(model, ids), logits(stages.restore(source), ids))


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_changed_in_place_change_the_codes_of_single_tokens(spiking, tokens, kind):
    model, ids = spiking(kind, roles=FEW), tokens(2, 11)
    twin = copy.deepcopy(model)
    text(model, ids[:, :3])
    for each in (model, twin):
        each.spiking_neurons.scale.mul_(2.5)
    assert torch.equal(text(model, ids[:, :3]), text(twin, ids[:, :3]))
    assert torch.equal(logits(model, ids[:1, :1]), logits(twin, ids[:1, :1]))


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_several_threads_do_not_meet(spiking, tokens, kind):
    """Their lengths and pads are those of one pass each."""
    model = spiking(kind)
    texts = [tokens(rows, length, length) for rows, length in ((2, 11), (1, 7), (3, 16), (2, 5))]
    masks = [torch.ones_like(text) for text in texts]
    for mask in masks[::2]:
        mask[0, :3] = 0
    pairs = [*zip(texts, masks, strict=True)] * 12
    alone = [logits(model, ids, attention_mask=mask) for ids, mask in pairs[: len(texts)]]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda pair: logits(model, pair[0], attention_mask=pair[1]), pairs)
        for number, got in enumerate(found):
            index = number % len(texts)
            real = masks[index].bool()
            assert torch.equal(got[real], alone[index][real])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_former_neurons_is_not_continued(spiking, tokens, kind):
    model, ids = spiking(kind), tokens(1, 8)
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
        model(ids[:, :1], cache=cache)
        model.spiking_neurons.scale.mul_(2)
        refused(lambda: model(ids[:, :1], cache=cache), "coded by other neurons", "empty one")


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_of_other_neurons_is_refused_before_a_weight_is_read(spiking, tokens, kind):
    model, ids = spiking(kind), tokens(2, 11)
    before = logits(model, ids)
    others = {
        "steps": spiking(kind, replace(GATED, timesteps=5)),
        "sites": spiking(kind, roles=tuple(role for role in ROLES if role != "mlp.down")),
    }
    for other in others.values():
        with torch.no_grad():
            other.lm_head.weight.mul_(2)
        state = through_a_file(other.state_dict())
        refused(partial(model.load_state_dict, state, strict=False), "neurons of another coding")
        assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_state_dict_and_a_spiking_model_do_not_pass_for_each_other(
    spiking, dense, tokens, kind
):
    model, plain, ids = spiking(kind), dense(kind), tokens(2, 11)
    before, real = logits(model, ids), logits(plain, ids)
    with pytest.raises(RuntimeError, match="Unexpected key.*spiking_neurons"):
        plain.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*spiking_neurons"):
        model.load_state_dict(plain.state_dict())
    assert torch.equal(logits(plain, ids), real) and torch.equal(logits(model, ids), before)
    model.load_state_dict(plain.state_dict(), strict=False)  # weights alone: the neurons stay
    assert torch.equal(logits(model, ids), before) and not torch.equal(before, real)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_prefix_is_not_left_behind_by_other_weights(tiny, convert, tokens, kind):
    def made_again():
        model = tiny(kind, **({"sliding_window": 19} if kind == "mistral" else {}))
        RotatePrefix("rotate_prefix", 3, PrefixSearch(64)).apply(model, PREFIX)
        return stages.bind(model, convert(model, GATED))

    model, other, ids = made_again(), made_again(), tokens(2, 11)
    before = logits(model, ids)
    model.load_state_dict(through_a_file(other.state_dict()))  # the same weights
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    refused(lambda: model.load_state_dict(other.state_dict()), "computed with its weights")
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_one_conversion_are_independent(dense, convert, tokens, kind):
    ids, fitted = tokens(2, 11), convert(dense(kind), GATED)
    first, second = (stages.bind(dense(kind), fitted) for _ in range(2))
    before = logits(second, ids)
    assert torch.equal(logits(first, ids), before)
    first.spiking_neurons.scale.mul_(2)
    assert not torch.equal(logits(first, ids), before)
    assert torch.equal(logits(second, ids), before)
    assert torch.equal(logits(stages.bind(dense(kind), fitted), ids), before)
    scale = stages.conversion(first).neurons.fit.params["scale"]
    assert torch.equal(scale, 2 * fitted.neurons.fit.params["scale"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_out_of_a_block_stays_spiking_behind_it(dense, convert, tokens, kind):
    model, ids = dense(kind), tokens(2, 11)
    real = logits(model, ids)
    with stages.patched(model, convert(model, GATED)):
        twin, before = copy.deepcopy(model), logits(model, ids)
    assert torch.equal(logits(model, ids), real) and not torch.equal(before, real)
    assert torch.equal(logits(twin, ids), before)
    assert torch.equal(logits(stages.restore(twin), ids), real)


# Other types of numbers


@pytest.mark.slow
@pytest.mark.parametrize("cast", ["half", "double"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_model_has_the_logits_of_a_cast_dense_one_with_its_neurons(
    spiking, dense, tokens, kind, cast
):
    model, ids = spiking(kind), tokens(2, 11)
    fitted, table = stages.conversion(model), stages.table(model)
    plain = getattr(dense(kind), cast)()
    real = logits(plain, ids)
    stages.bind(plain, fitted)
    assert getattr(model, cast)() is model
    assert {value.dtype for value in model.spiking_neurons.buffers()} == {torch.float32}
    assert torch.equal(logits(model, ids), logits(plain, ids))
    assert torch.equal(logits(model, ids[:1, :1]), logits(plain, ids[:1, :1]))
    assert stages.table(model).equals(table)
    assert not torch.equal(logits(model, ids), real)
    assert torch.equal(logits(stages.restore(model), ids), real)


# Training


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_gradients_through_codes_are_refused(spiking, tokens, kind, checkpoints):
    model, ids = spiking(kind), tokens(2, 11)
    before = logits(model, ids)
    model.train()  # these models have no dropout
    if checkpoints:
        model.gradient_checkpointing_enable()
    out = model(ids, labels=ids)
    assert torch.equal(out.logits, before)
    refused(out.loss.backward, "no gradient passes a spiking model", "stages.restore(model)")
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("lm_head"))
    stages.restore(model)(ids, labels=ids).loss.backward()
    assert all(bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_head_is_trained_on_what_spikes_give_it(spiking, tokens, kind):
    model, ids = spiking(kind), tokens(2, 11)
    model.requires_grad_(False).lm_head.weight.requires_grad_(True)
    seen = []
    handle = model.lm_head.register_forward_pre_hook(lambda head, args: seen.append(args[0]))
    model(ids, labels=ids).loss.backward()
    handle.remove()
    weight = model.lm_head.weight.detach().clone().requires_grad_()
    given = (seen[0] @ weight.t())[:, :-1].flatten(0, 1)
    cross_entropy(given, ids[:, 1:].flatten()).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, weight.grad)


def test_dropout_of_attention_is_refused(spiking, tokens):
    model, ids = spiking("gpt2", attn_pdrop=0.1), tokens(2, 11)
    refused(lambda: model.train()(ids), "attention dropout of 0.1", "model.eval()")
    model.eval()(ids)


# What transformers does to a model beside


@pytest.mark.parametrize(
    "coding", [GATED, Gif("gif", 3, 16, 0.0, "unary", None)], ids=lambda c: c.name
)
@pytest.mark.parametrize("kind", KINDS)
def test_ties_checkpoints_and_outputs_leave_the_neurons(spiking, tokens, kind, coding, tmp_path):
    model, ids = spiking(kind, coding), tokens(2, 11)
    before, table = logits(model, ids), stages.table(model)
    model.tie_weights()
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    model.train().eval()
    model.requires_grad_(False)
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert torch.equal(out.logits, before) and len(out.hidden_states) == 3
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)
    refused(model.dequantize, "stages.restore(model)")
    assert torch.equal(logits(model, ids), before)
    model.save_pretrained(tmp_path / "spiking", push_to_hub=False)
    assert torch.equal(logits(stages.load(tmp_path / "spiking"), ids), before)
    assert stages.table(model).equals(table)
