"""Ported attention: without a coding it is the eager one, and with a coding it stays causal."""

import pytest
import torch
from transformers import AttentionMaskInterface

from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.errors import InputError
from stages.model.sites import find_sites
from stages.ports import attention, visibility
from stages.ports.hooks import attached
from stages.ports.patched import patched

KINDS = ["llama", "mistral", "qwen2"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def ported(model):
    """The dense model through ported attention."""
    return attached(model, find_sites(model), {})


def padded(tokens, side):
    """A batch of 3 rows with 4, 0 and 7 pads on one side: ids, mask [3, 12]."""
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    for row, pads in enumerate((4, 0, 7)):
        hidden = slice(0, pads) if side == "left" else slice(12 - pads, 12)
        mask[row, hidden] = 0
    return ids.where(mask.bool(), 49), mask


@torch.no_grad()
def logits(model, ids, mask=None, **kwargs):
    return model(ids, attention_mask=mask, use_cache=False, **kwargs).logits


@torch.no_grad()
def in_chunks(model, ids, mask, sizes):
    """Logits of ids fed piece by piece on a growing cache."""
    cache, parts, start = None, [], 0
    for size in sizes:
        stop = start + size
        seen = None if mask is None else mask[:, :stop]
        out = model(ids[:, start:stop], attention_mask=seen, cache=cache, use_cache=True)
        cache, start = out.cache, stop
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_batch_has_the_eager_logits(tiny, tokens, kind):
    model, ids = tiny(kind), tokens(3, 12)
    dense = logits(model, ids)
    with ported(model):
        torch.testing.assert_close(logits(model, ids), dense, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_real_positions_of_a_padded_batch_have_the_eager_logits(tiny, tokens, kind, side):
    model, (ids, mask) = tiny(kind), padded(tokens, side)
    dense = logits(model, ids, mask)
    with ported(model):
        found = logits(model, ids, mask)
    torch.testing.assert_close(found[mask.bool()], dense[mask.bool()], **CLOSE)


@pytest.mark.parametrize("length", [7, 8, 16, 29])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_several_query_blocks_have_the_eager_logits(tiny, tokens, small_blocks, kind, length):
    model, ids = tiny(kind), tokens(2, length)
    dense = logits(model, ids)
    with ported(model):
        torch.testing.assert_close(logits(model, ids), dense, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_block_of_pads_only_has_no_influence(model, tokens, small_blocks, side):
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, slice(0, 11) if side == "left" else slice(9, 20)] = 0
    dense = logits(model, ids, mask)
    with ported(model):
        found = logits(model, ids, mask)
    torch.testing.assert_close(found[mask.bool()], dense[mask.bool()], **CLOSE)


@pytest.mark.parametrize("sizes", [(12,), (5, 6, 1), (1, 3, 8), (9, 1, 1, 1)])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_chunks_on_a_cache_have_the_eager_logits(tiny, tokens, kind, sizes):
    model, (ids, mask) = tiny(kind), padded(tokens, "left")
    dense = logits(model, ids, mask)
    with ported(model):
        found = in_chunks(model, ids, mask, sizes)
    torch.testing.assert_close(found[mask.bool()], dense[mask.bool()], **CLOSE)


def test_a_chunk_of_several_blocks_on_a_cache_has_the_eager_logits(model, tokens, small_blocks):
    ids = tokens(2, 30)
    dense = logits(model, ids)
    with ported(model):
        torch.testing.assert_close(in_chunks(model, ids, None, (10, 20)), dense, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pads", [True, False])
def test_greedy_generation_gives_the_eager_tokens(tiny, tokens, kind, pads):
    model, (ids, mask) = tiny(kind), padded(tokens, "left")
    mask = mask if pads else torch.ones_like(mask)
    settings = {"max_new_tokens": 10, "do_sample": False, "attention_mask": mask}
    dense = model.generate(ids, **settings)
    with ported(model):
        assert torch.equal(model.generate(ids, **settings), dense)
    assert dense.shape == (3, 22) and len(dense[:, 12:].unique()) > 5


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_kept_logits_are_computed(model, tokens, keep):
    ids, mask = padded(tokens, "left")
    dense = logits(model, ids, mask)[:, -keep:]
    with ported(model):
        torch.testing.assert_close(logits(model, ids, mask, logits_to_keep=keep), dense, **CLOSE)


def test_what_the_attention_does_not_compute_is_refused(model):
    module, x = model.model.layers[0].self_attn, torch.zeros(1, 4, 3, 10)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    for bad in (
        {"attention_mask": None},
        {"attention_mask": mask.float()},
        {"attention_mask": mask, "softcap": 30.0},
        {"attention_mask": mask, "s_aux": x},
    ):
        with pytest.raises(NotImplementedError, match="ported attention needs"):
            attention.ported_attention(module, x, x, x, scaling=1.0, **bad)


def test_dropout_of_a_model_in_training_is_refused_in_one_line(tiny, tokens):
    model = tiny(attention_dropout=0.1)
    with ported(model):
        dense = logits(model, tokens(1, 5))
        model.train()
        with pytest.raises(InputError, match=r"dropout of 0\.1 .*call model\.eval\(\)"):
            logits(model, tokens(1, 5))
        model.eval()
        assert torch.equal(logits(model, tokens(1, 5)), dense)


def causal(model, ids):
    """Whether no token changes an earlier logit by one bit, while each changes its own."""
    before = logits(model, ids)
    for position in range(ids.shape[1]):
        other = ids.clone()
        other[:, position] = (other[:, position] + 1) % 48
        same = (logits(model, other) == before).flatten(2).all(-1)
        if not bool(same[:, :position].all()) or bool(same[:, position].any()):
            return False
    return True


SPIKING = [Las("las_rounded", 6, "half_step"), Gated("gated", 6, 2)]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("coding", SPIKING, ids=lambda coding: coding.name)
def test_a_future_token_never_changes_an_earlier_logit(tiny, tokens, convert, kind, coding):
    model = tiny(kind)
    with patched(model, convert(model, coding)):
        assert causal(model, tokens(2, 12, seed=3))


@pytest.mark.parametrize("coding", SPIKING, ids=lambda coding: coding.name)
def test_causality_over_several_query_blocks(model, tokens, convert, small_blocks, coding):
    with patched(model, convert(model, coding)):
        assert causal(model, tokens(1, 20, seed=3))


@pytest.mark.parametrize("coding", SPIKING, ids=lambda coding: coding.name)
def test_the_causality_check_fails_where_the_mask_allows_all(
    model, tokens, convert, monkeypatch, coding
):
    def everything(*args, **kwargs):
        return torch.ones_like(attention.ported_mask(*args, **kwargs))

    conversion = convert(model, coding)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, attention.NAME, everything)
    with patched(model, conversion):
        assert not causal(model, tokens(2, 12, seed=3))


def test_attention_registered_without_its_mask_is_refused(model, tokens, monkeypatch):
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, attention.NAME)
    with ported(model), pytest.raises(NotImplementedError, match="mask=None"):
        logits(model, tokens(1, 4))


def test_the_causality_check_fails_for_a_model_that_reads_nothing(model, tokens):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not causal(model, tokens(1, 4))


def test_blocks_of_other_sizes_are_not_taken_for_each_other():
    """As where one layer asks for whole blocks and another for parts of the same mask."""
    mask = torch.ones(3, 1, 20, 20).tril().bool()
    seen = visibility._visibility(mask, None)
    for rows in (slice(0, 1), slice(0, 3)):
        for queries in (slice(0, 8), slice(0, 16)):
            view = seen.block(rows, queries, queries.stop)
            assert torch.equal(view.mask, mask[rows, :, queries, : queries.stop])
            assert seen.block(rows, queries, queries.stop) is view
