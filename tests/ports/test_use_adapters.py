"""Adapters on top of a spiking model: merged ones keep its neurons, others are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import stages
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.errors import InputError
from tests.model.families import made

CODINGS = [Gated("gated", 4, 2), Las("las", 5, "half_step")]
# One projection whose site is the output of a norm, others whose site is their input, the head, the table.
PLACES = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"],
    "gpt2": ["c_attn", "c_fc", "c_proj", "lm_head", "wte"],
}
EACH = [(kind, place) for kind, places in PLACES.items() for place in places]


@pytest.fixture
def dense(tiny):
    return lambda kind: made(kind, tie_word_embeddings=False) if kind == "gpt2" else tiny(kind)


@pytest.fixture
def spiking(dense, convert):
    def make(kind, coding=CODINGS[0]):
        model = dense(kind)
        return stages.bind(model, convert(model, coding))

    return make


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


class Adapter(nn.Module):
    """What adapters of rank 2 do: a module, and two products beside it."""

    def __init__(self, inner, outputs):
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.LazyLinear(2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x):
        y = self.inner(x)
        return y + self.up(self.down(x if x.is_floating_point() else y))


@pytest.mark.parametrize(("kind", "place"), EACH)
def test_a_product_beside_a_module_is_refused_until_it_is_taken_off(spiking, tokens, kind, place):
    model, ids = spiking(kind), tokens(2, 9)
    before = logits(model, ids)
    path = next(name for name, _ in model.named_modules() if name.split(".")[-1] == place)
    above, inner = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    outputs = getattr(inner, "out_features", getattr(inner, "nf", model.config.hidden_size))
    setattr(above, place, Adapter(inner, outputs))
    with pytest.raises(InputError, match=r"merge_and_unload of peft") as error:
        logits(model, ids)
    assert f"{path} of this model was replaced" in str(error.value) and "\n" not in str(error.value)
    setattr(above, place, inner)
    assert torch.equal(logits(model, ids), before)


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture
def lora(peft):
    def adapt(model, places):
        torch.manual_seed(3)
        settings = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
        config = peft.LoraConfig(target_modules=places, task_type="CAUSAL_LM", **settings)
        return peft.get_peft_model(model, config).eval()

    return adapt


@pytest.mark.parametrize(("kind", "place"), EACH[::4])
def test_lora_is_refused(spiking, tokens, lora, kind, place):
    adapted, ids = lora(spiking(kind), [place]), tokens(2, 9)
    with pytest.raises(InputError, match=r"was replaced .*merge_and_unload of peft"):
        logits(adapted, ids)


@pytest.mark.slow
@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.name)
@pytest.mark.parametrize("kind", PLACES)
def test_merged_into_a_spiking_model_lora_is_that_of_the_dense_one(
    spiking, dense, tokens, lora, kind, coding
):
    model, ids, places = spiking(kind, coding), tokens(2, 9), PLACES[kind][:-2]
    before, fitted = logits(model, ids), stages.conversion(model)
    table = stages.table(model)
    merged = lora(model, places).merge_and_unload()
    want = stages.bind(lora(dense(kind), places).merge_and_unload(), fitted)
    assert torch.equal(logits(merged, ids), logits(want, ids))
    assert not torch.allclose(logits(merged, ids), before, atol=1e-2)
    assert stages.table(merged).equals(table)
    real = logits(stages.restore(want), ids)
    assert torch.equal(logits(stages.restore(merged), ids), real)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLACES)
def test_an_adapted_model_is_converted_once_it_is_merged(dense, tokens, convert, lora, kind):
    adapted = lora(dense(kind), PLACES[kind][:2])
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(InputError, match="linear modules fed by no site"):
            convert(model, CODINGS[0])
    merged, ids = adapted.merge_and_unload(), tokens(2, 9)
    real = logits(merged, ids)
    stages.bind(merged, convert(merged, CODINGS[0]))
    assert not torch.equal(logits(merged, ids), real)
    assert torch.equal(logits(stages.restore(merged), ids), real)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLACES)
def test_virtual_tokens_are_coded_as_others(spiking, tokens, peft, kind):
    model, ids = spiking(kind), tokens(2, 9)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    virtual = adapted.get_prompt(batch_size=2)
    whole = torch.cat([virtual, model.get_input_embeddings()(ids)], 1)
    with torch.no_grad():
        want = model(inputs_embeds=whole).logits
        real = stages.restore(copy.deepcopy(model))(inputs_embeds=whole).logits
    assert torch.equal(logits(adapted, ids), want) and not torch.equal(want, real)
