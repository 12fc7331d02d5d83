"""A causal pass without a mask is bit for bit the pass with the whole mask; a mask is never lost."""

import copy

import pytest
import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from stages.codings.gated import Gated
from stages.errors import InputError
from stages.model.sites import find_sites
from stages.ports import attention, visibility
from stages.ports.counters import Counters
from stages.ports.hooks import attached
from stages.ports.patched import patched
from stages.ports.visibility import CausalMask
from tests.model.families import made

GATED = Gated("gated", 4, 2)
LENGTH = 21  # three blocks, the last one shorter
UNGROUPED = {"num_key_value_heads": 4}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)


@pytest.fixture
def masks(monkeypatch):
    """What the passes of a test have read, in their order: what `ported_mask` gives, or whole masks."""
    read, original = [], visibility._visibility

    def recorded(mask, real):
        read.append(mask)
        return original(mask, real)

    monkeypatch.setattr(visibility, "_visibility", recorded)
    return read


@pytest.fixture
def whole(monkeypatch):
    """Lets masks be built, all of them."""

    def built(**kwargs):
        return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})

    def switch():
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, attention.NAME, built)

    return switch


def square(length):
    """The mask of a causal pass [1, 1, S, S]."""
    return torch.ones(length, length).tril().bool()[None, None]


def packed(ids):
    """Positions of two sequences in one row, without a mask."""
    half = ids.shape[1] // 2
    return torch.cat([torch.arange(half), torch.arange(ids.shape[1] - half)])[None]


def left(ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return mask


PASSES = {
    "plain": lambda ids: {},
    "all real": lambda ids: {"attention_mask": torch.ones_like(ids)},
    "left pads": lambda ids: {"attention_mask": left(ids)},
    "packed": lambda ids: {"position_ids": packed(ids)},
    "mask of a user": lambda ids: {
        "attention_mask": square(ids.shape[1]).expand(len(ids), -1, -1, -1)
    },
}
MARKED = {"plain", "all real"}


def outcome(model, conversion, ids, sizes=(LENGTH,), counts=True, **options):
    """The logits of all passes, and the sums of all counters."""
    counters = Counters(find_sites(model), model.device) if counts else None
    logits, cache, start = [], None, 0
    with torch.no_grad(), patched(model, conversion, counters):
        for size in sizes:
            more = {"use_cache": True, "cache": cache} if len(sizes) > 1 else {"use_cache": False}
            out = model(ids[:, start : start + size], **more, **options)
            cache, start = out.cache if len(sizes) > 1 else None, start + size
            logits.append(out.logits)
    return torch.cat(logits, 1), counters.sums if counts else None


KINDS = {
    "llama": ("llama", {}),
    "ungrouped": ("llama", UNGROUPED),
    "mistral": ("mistral", {}),
    "gemma3_text": ("gemma3_text", {}),
    "gpt_neo": ("gpt_neo", {}),
}


@pytest.mark.parametrize(
    ("kind", "more", "case"),
    [
        pytest.param(*given, case, id=f"{name}-{case}")
        for name, given in KINDS.items()
        for case in PASSES
        if (name, case) != ("gpt_neo", "packed")  # its positions are learned
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_no_mask_gives_the_bits_of_the_whole_mask(
    tiny, tokens, convert, masks, whole, kind, more, rows, case
):
    model = made(kind) if kind == "gpt_neo" else tiny(kind, **more)
    ids = tokens(rows, LENGTH, 3)
    options, conversion = PASSES[case](ids), convert(model, GATED)
    counts = case != "mask of a user"
    masks.clear()
    got = outcome(model, conversion, ids, counts=counts, **options)
    marked = case in MARKED and kind not in ("mistral", "gpt_neo")
    assert any(isinstance(mask, CausalMask) for mask in masks) == marked
    whole()
    masks.clear()
    want = outcome(model, conversion, ids, counts=counts, **options)
    assert not any(isinstance(mask, CausalMask) for mask in masks)
    assert torch.equal(got[0], want[0])
    assert not counts or torch.equal(got[1], want[1])


@pytest.mark.parametrize("sizes", [(13, 8), (10, 10, 1)])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_chunks_on_a_cache_have_the_bits_of_whole_masks(
    tiny, tokens, convert, masks, whole, kind, sizes
):
    model, ids = tiny(kind), tokens(2, LENGTH, 3)
    conversion = convert(model, GATED)
    masks.clear()
    got = outcome(model, conversion, ids, sizes)
    assert isinstance(masks[0], CausalMask) == (kind == "llama")
    assert not any(isinstance(mask, CausalMask) for mask in masks[1:])
    whole()
    want = outcome(model, conversion, ids, sizes)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("pads", [True, False])
def test_generated_tokens_are_those_of_whole_masks(model, tokens, convert, masks, whole, pads):
    ids, conversion = tokens(2, LENGTH, 3), convert(model, GATED)
    given = left(ids) if pads else torch.ones_like(ids)
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    settings |= {"attention_mask": given, "return_dict_in_generate": True}
    masks.clear()
    with patched(model, conversion):
        got = model.generate(ids, **settings)
    assert isinstance(masks[0], CausalMask) != pads
    whole()
    with patched(model, conversion):
        want = model.generate(ids, **settings)
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


def test_dense_attention_without_a_mask_is_that_of_a_kernel_without_one(tiny, tokens, masks):
    """Where transformers itself leaves out the mask."""
    ids = tokens(2, LENGTH)
    model = tiny(attention="sdpa")
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        with attached(model, find_sites(model), {}):
            assert torch.equal(model(ids, use_cache=False).logits, dense)
    assert [type(mask) for mask in masks] == [CausalMask]


def test_a_causal_pass_makes_no_mask_of_all_pairs(model, tokens, convert, monkeypatch):
    made, sizes = CausalMask.made, []

    def recorded(mask):
        sizes.append(mask.numel())
        return made(mask)

    conversion = convert(model, GATED)
    monkeypatch.setattr(CausalMask, "made", recorded)
    outcome(model, conversion, tokens(1, LENGTH))
    assert sizes and max(sizes) <= 16 * 16


# The mask that was not made


OPERATIONS = {
    "as keys are cut": lambda mask: mask[:, :, :, :5],
    "contiguous": lambda mask: mask.contiguous(),
    "copied": lambda mask: mask.clone(),
    "deeply": lambda mask: copy.deepcopy(mask),
    "inverted": lambda mask: ~mask,
    "with another": lambda mask: mask & mask.new_ones(1, 1, 6, 6).triu(-2),
    "as second": lambda mask: torch.ones(6, 6).where(mask, 0.0),
    "as a bias": lambda mask: torch.zeros(6, 6).masked_fill(~mask, -1.0),
    "as what another becomes": lambda mask: torch.ones(6).to(mask),
    "as numbers": lambda mask: mask.to(torch.float32),
    "joined": lambda mask: torch.cat([mask, mask], -1),
    "for all rows": lambda mask: mask.expand(3, 2, -1, -1),
    "summed": lambda mask: mask.sum(-1),
    "array": lambda mask: torch.from_numpy(mask.numpy()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_done_to_it_is_done_to_the_mask(name):
    got = OPERATIONS[name](CausalMask.of(1, 6, 6, "cpu"))
    assert type(got) is torch.Tensor and torch.equal(got, OPERATIONS[name](square(6)))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_write_is_refused_which_would_be_lost(rows):
    mask = CausalMask.of(rows, 6, 6, "cpu")
    with pytest.raises(InputError, match="no mask was made to write to"):
        mask[..., 3] = False
    with pytest.raises(InputError, match=r"masked_fill_.*mask.clone"):
        mask.masked_fill_(mask, False)
    other = torch.zeros_like(mask)
    other |= mask
    assert torch.equal(other, mask.clone()) and torch.equal(other.zero_().copy_(mask), other)


def test_it_has_the_size_of_the_mask_and_none_of_its_memory():
    mask = CausalMask.of(2, 3, 5, "cpu")
    assert mask.shape == (2, 1, 3, 5) and mask.dtype == torch.bool and mask.dim() == 4
    assert torch.equal(mask.made()[:, 0], torch.ones(3, 5).tril(2).bool().expand(2, -1, -1))
    with torch._C.DisableTorchFunctionSubclass():
        assert mask.untyped_storage().nbytes() == 1


def test_on_another_device_it_is_not_made_either():
    mask = CausalMask.of(2, 6, 6, "cpu")
    assert mask.to("cpu", non_blocking=True) is mask and mask.to(torch.bool) is mask
    moved = mask.to("meta")
    assert type(moved) is CausalMask and moved.device.type == "meta" and moved.shape == mask.shape


def test_of_a_pass_with_pads_it_is_made(monkeypatch):
    """As where the pads of a pass are not those that its mask was chosen by."""
    real = torch.tensor([[False] * 2 + [True] * 4])
    seen = visibility._visibility(CausalMask.of(1, 6, 6, "cpu"), real)
    assert not seen.view.causal and torch.equal(seen.view.mask, square(6))
    assert seen.watched.tolist() == [[4, 4, 4, 3, 2, 1]]


def test_it_says_what_the_mask_says():
    got, want = (
        visibility._visibility(m, None) for m in (CausalMask.of(1, 9, 9, "cpu"), square(9))
    )
    assert torch.equal(got.view.seen, want.view.seen) and torch.equal(got.watched, want.watched)
    assert (*got.reach,) == want.reach and got.causal and want.causal and got.view.causal
    for queries in (slice(0, 4), slice(4, 8), slice(8, 9)):
        block, same = (each.block(slice(0, 1), queries, queries.stop) for each in (got, want))
        assert torch.equal(block.mask, same.mask) and torch.equal(block.bias, same.bias)
        assert block.causal and not same.causal and torch.equal(block.seen, same.seen)


def test_a_mask_that_lost_what_it_stands_for_is_refused(model, tokens, convert, monkeypatch):
    def lost(**kwargs):
        return attention.ported_mask(**kwargs).as_subclass(torch.Tensor)

    conversion = convert(model, GATED)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, attention.NAME, lost)
    with pytest.raises(InputError, match="no token sees"):
        outcome(model, conversion, tokens(1, 9))


SIZES = {"batch_size": 2, "q_length": 6, "kv_length": 6, "device": "cpu"}


@pytest.mark.parametrize(
    "other",
    [
        {"local_size": 6},
        {"kv_length": 8, "q_offset": 2},
        {"q_length": 1, "q_offset": 5},
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6]).bool()},
        {"mask_function": lambda b, h, q, k: k >= 0},
    ],
    ids=["window", "keys before", "one query", "pads", "of a model"],
)
def test_the_mask_of_another_pass_is_built(other):
    """As is that of transformers, which allows no skip where a model adds to its mask."""
    given = SIZES | other
    want = sdpa_mask(**given, allow_is_causal_skip=False)
    skip = "mask_function" not in other
    mask = attention.ported_mask(
        **given, allow_is_causal_skip=skip, allow_is_bidirectional_skip=not skip
    )
    assert type(attention.ported_mask(**SIZES)) is CausalMask
    assert type(mask) is torch.Tensor and torch.equal(mask, want)
