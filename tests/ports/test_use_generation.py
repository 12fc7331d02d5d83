"""Caches, assistants, beams and prefixes write the tokens of the spiking model, or are refused."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformers import StaticCache

import stages
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.errors import InputError
from stages.transforms.prefix import attach_prefix
from stages.transforms.search import PrefixSearch
from stages.transforms.transform import RotatePrefix
from tests.model.families import made

GATED = Gated("gated", 4, 2)
KINDS = ["llama", "gemma3_text"]  # the second with a sliding window of 5 in its first layer
PREFIX = (7, 3, 48)
LEFT = torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9])


@pytest.fixture
def spiking(tiny, convert):
    def make(kind, coding=GATED, prefix=(), **more):
        model = made(kind, **more) if kind == "gpt_neo" else tiny(kind, **more)
        if prefix:
            RotatePrefix("rotate_prefix", 3, PrefixSearch(64)).apply(model, prefix)
        return stages.bind(model, convert(model, coding))

    return make


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


@torch.no_grad()
def greedy(model, ids, new):
    """Tokens written by whole passes, without a cache and without `generate`."""
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


FIXED = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


# Caches


@pytest.mark.parametrize(
    ("kind", "coding"), [("llama", Las("las_rounded", 5, "half_step")), ("gemma3_text", GATED)]
)
def test_a_static_cache_gives_what_whole_passes_give(spiking, tokens, kind, coding):
    model, ids = spiking(kind, coding), tokens(2, 9)
    want, mask = greedy(model, ids, 8), torch.ones_like(ids)
    for given in (
        {"cache_implementation": "static"},
        {"cache": StaticCache(config=model.config, max_cache_len=24)},
    ):
        assert torch.equal(model.generate(ids, attention_mask=mask, **FIXED, **given), want)
    assert not torch.equal(greedy(stages.restore(model), ids, 8), want)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_on_a_static_cache_have_the_logits_of_the_whole(spiking, tokens, kind):
    model, ids = spiking(kind), tokens(2, 14)
    cache = StaticCache(config=model.config, max_cache_len=24)
    parts = [logits(model, part, cache=cache, use_cache=True) for part in ids.split([6, 1, 7], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids), rtol=1e-4, atol=1e-4)


# Drafts, beams, what generate returns


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_assistant_changes_no_token_whichever_of_both_spikes(spiking, tokens, kind):
    model, ids = spiking(kind), tokens(1, 9)
    dense = stages.restore(copy.deepcopy(model))
    options = FIXED | {"attention_mask": torch.ones_like(ids)}
    for writer, helper in ((model, dense), (dense, model)):
        want = greedy(writer, ids, 8)
        assert torch.equal(writer.generate(ids, assistant_model=helper, **options), want)
    assert torch.equal(
        model.generate(ids, assistant_early_exit=1, **options), greedy(model, ids, 8)
    )
    assert not torch.equal(greedy(model, ids, 8), greedy(dense, ids, 8))


@pytest.mark.slow
@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("kind", KINDS)
def test_beams_have_the_likelihoods_of_whole_passes(spiking, tokens, kind, beams):
    model, ids = spiking(kind), tokens(2, 9)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        return_dict_in_generate=True,
        output_scores=True,
        output_attentions=True,
        length_penalty=0.0,
        **FIXED,
        **beams,
    )
    scores = logits(model, out.sequences)[:, 8:-1].log_softmax(-1)
    want = scores.gather(2, out.sequences[:, 9:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_continuous_batches_are_refused(spiking, tokens, kind):
    model, ids = spiking(kind), tokens(1, 9)
    before = logits(model, ids)
    with pytest.raises(ValueError, match="ported is not supported"):
        model.generate_batch([ids[0].tolist()], max_new_tokens=2)
    assert torch.equal(logits(model, ids), before)


# Pads, prefixes and windows


WINDOW = 20  # three tokens of the prefix, nine of a prompt, eight that are written


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "llama"])
def test_a_padded_batch_behind_a_prefix_writes_what_each_prompt_writes_alone(
    spiking, tiny, tokens, convert, kind
):
    more = {} if kind == "llama" else {"sliding_window": WINDOW}
    if kind == "gemma3_text":  # its norms stand in the way of a rotation, not of a prefix
        model = tiny(kind, **more)
        attach_prefix(model, PREFIX)
        stages.bind(model, convert(model, GATED))
    else:
        model = spiking(kind, prefix=PREFIX, **more)
    ids = tokens(2, 9)
    written = model.generate(ids, attention_mask=LEFT, **FIXED)[:, 9:]
    positions = (LEFT.cumsum(-1) - 1).clamp(min=0)
    given = model.generate(ids, attention_mask=LEFT, position_ids=positions, **FIXED)[:, 9:]
    assert torch.equal(given, written)
    for row, mask in enumerate(LEFT.bool()):
        alone = greedy(model, ids[row : row + 1, mask], 8)[:, -8:]
        assert torch.equal(written[row : row + 1], alone)
        for places in ({}, {"position_ids": positions}):
            got = logits(model, ids, attention_mask=LEFT, **places)[row, mask]
            want = logits(model, ids[row : row + 1, mask])[0]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["mistral", "gpt_neo"])  # a window of the cache, and of the mask
def test_a_prefix_never_leaves_a_window(spiking, tokens, kind):
    window = {"sliding_window": WINDOW} if kind == "mistral" else {"window_size": WINDOW}
    model, fits, longer = spiking(kind, prefix=PREFIX, **window), tokens(2, 17), tokens(2, 18)
    mask = torch.ones_like(longer)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits(model, fits)
    prompt = {"attention_mask": mask[:, 1:], "min_new_tokens": 2, "max_new_tokens": 2}
    for use in (
        partial(logits, model, longer),
        partial(logits, model, longer, attention_mask=mask),
        partial(logits, model, longer, attention_mask=mask, position_ids=positions),
        partial(model.generate, fits, **prompt),
    ):
        with pytest.raises(InputError, match="window of 20 would leave the prefix") as error:
            use()
        assert "\n" not in str(error.value)


def test_what_leaves_the_window_of_gpt_neo_is_not_seen():
    """The reference of that refusal: one layer, a change of the first token, and who notices it."""
    model = made("gpt_neo", num_hidden_layers=1, attention_types=[[["local"], 1]], window_size=12)
    ids = torch.arange(15)[None].repeat(2, 1)
    ids[1, 0] = 40
    first, second = logits(model, ids)
    noticed = (first - second).abs().amax(-1) > 1e-4
    assert noticed.tolist() == [True] * 12 + [False] * 3
