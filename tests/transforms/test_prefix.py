"""A model with a prefix is the plain model on the prefix and the text, read at the text alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from stages.analysis.operations import operations
from stages.capture import Capture
from stages.codings.las import Las
from stages.errors import InputError
from stages.evaluation import negative_log_likelihood, perplexity
from stages.model.prefix import prefix_length
from stages.model.sites import find_sites
from stages.ports.hooks import attached
from stages.ports.patched import patched
from stages.ports.port import DensePort
from stages.text.harness import _in_memory
from stages.transforms.prefix import attach_prefix
from stages.transforms.rotation import rotate
from stages.transforms.search import PrefixSearch

PREFIX = (7, 3, 48)
KINDS = {"llama": {}, "mistral": {"sliding_window": 19}, "qwen2": {}}  # just the longest text
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0] + [1] * 8])


@pytest.fixture(params=KINDS)
def pair(request, tiny):
    """The plain model, and the same one rotated and with a prefix."""
    plain, changed = (tiny(request.param, **KINDS[request.param]) for _ in range(2))
    rotate(changed, seed=1)
    attach_prefix(changed, PREFIX)
    return plain, changed


def behind(ids: Tensor) -> Tensor:
    return torch.cat([torch.tensor(PREFIX).expand(len(ids), -1), ids], dim=1)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("use_cache", [None, False, True])
def test_logits_are_those_behind_the_prefix(pair, tokens, use_cache):
    plain, changed = pair
    ids = tokens(3, 9)
    with torch.no_grad():
        want = plain(behind(ids)).logits[:, len(PREFIX) :]
        close(changed(ids, use_cache=use_cache).logits, want)
        close(changed(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, want)
        close(changed(ids, None, torch.arange(9)[None]).logits, want)
        assert not torch.allclose(plain(ids).logits, want, atol=0.1)  # it makes a difference


def test_a_prefix_goes_where_its_model_goes(pair, tokens):
    plain, changed = pair
    ids = tokens(3, 9)
    with torch.no_grad():
        want = plain(behind(ids)).logits[:, len(PREFIX) :]
        assert changed.to(torch.bfloat16)(ids).logits.dtype == torch.bfloat16
        error = changed(ids).logits - want
        assert float(error.norm()) < 0.05 * float(want.norm())
        changed.to("meta")
        assert changed(ids.to("meta")).logits.is_meta


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", [True, False])
def test_logits_of_padded_rows_are_those_of_each_row_alone(pair, tokens, side, positions):
    plain, changed = pair
    ids, padded = tokens(3, 9), LEFT if side == "left" else LEFT.flip(-1)
    given = {"position_ids": (padded.cumsum(-1) - 1).clamp(min=0)} if positions else {}
    with torch.no_grad():
        got = changed(ids, attention_mask=padded, **given).logits
        with patched(changed, None):
            ported = changed(ids, attention_mask=padded, **given).logits
        for row, mask in enumerate(padded.bool()):
            want = plain(behind(ids[row : row + 1, mask])).logits[0, len(PREFIX) :]
            close(got[row, mask], want)
            close(ported[row, mask], want)


def test_the_decoder_alone_stands_behind_the_prefix_too(pair, tokens):
    plain, changed = pair
    ids = tokens(3, 9)
    with torch.no_grad():
        want = plain(behind(ids)).logits[:, len(PREFIX) :]
        close(changed.lm_head(changed.model(ids).last_hidden_state), want)


def test_a_text_may_come_in_pieces(pair, tokens):
    plain, changed = pair
    ids, cache = tokens(2, 9), DynamicCache(config=changed.config)
    with torch.no_grad():
        want = plain(behind(ids)).logits[:, len(PREFIX) :]
        parts = [changed(part, cache=cache).logits for part in ids.split([4, 1, 4], dim=1)]
    close(torch.cat(parts, dim=1), want)
    assert cache.get_seq_length() == len(PREFIX) + 9


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}])
def test_greedy_generation_is_that_behind_the_prefix(pair, tokens, options):
    plain, changed = pair
    prompt = tokens(2, 6)
    mask = torch.ones_like(prompt)
    fixed = {"max_new_tokens": 8, "do_sample": False} | options
    got = changed.generate(prompt, attention_mask=mask, **fixed)
    whole = behind(prompt)
    want = plain.generate(whole, attention_mask=torch.ones_like(whole), **fixed)
    assert torch.equal(got[:, :6], prompt)
    assert torch.equal(got, want[:, len(PREFIX) :])


def test_generation_of_a_padded_batch_is_that_of_each_prompt_alone(tiny, tokens):
    plain, changed = tiny(), tiny()
    attach_prefix(changed, PREFIX)
    prompts = tokens(3, 9)
    with patched(changed, None):
        got = changed.generate(prompts, attention_mask=LEFT, max_new_tokens=6, do_sample=False)
    for row, mask in enumerate(LEFT.bool()):
        alone = behind(prompts[row : row + 1, mask])
        want = plain.generate(alone, max_new_tokens=6, do_sample=False)[0, alone.shape[1] :]
        size = min(6, len(want))  # a row may end before the others
        assert got[row, 9 : 9 + size].tolist() == want[:size].tolist()


def test_perplexity_is_that_of_the_text_behind_the_prefix(pair, tokens):
    plain, changed = pair
    ids = tokens(4, 12)
    got = perplexity(changed, ids, None, 2, "text").metrics
    with torch.no_grad():
        logits = plain(behind(ids)).logits[:, len(PREFIX) :]
    want = negative_log_likelihood(logits, ids).sum() / (4 * 11)
    assert got["nll"] == pytest.approx(float(want), rel=1e-4)


def test_log_likelihoods_of_lm_eval_are_those_behind_the_prefix(tiny, byte_tokenizer, tiny_llama):
    from lm_eval.api.instance import Instance

    questions = [("ab cd", " ef"), ("a much longer question than that", " x"), ("q", " why")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(questions)]
    plain = tiny_llama
    want = []
    with torch.no_grad():
        for question, answer in questions:
            ids = byte_tokenizer([question + answer], return_tensors="pt").input_ids
            size = len(byte_tokenizer(answer).input_ids)
            scores = plain(behind(ids)).logits.log_softmax(-1)[0, -size - 1 : -1]
            want.append(float(scores.gather(1, ids[0, -size:, None]).sum()))
    attach_prefix(plain, PREFIX)
    with _in_memory(plain, byte_tokenizer, batch_size=2) as lm:
        got = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    assert got == pytest.approx(want, rel=1e-4)


class Keep(DensePort):
    """Keeps the values of new, real rows."""

    def __call__(self, x, real, fanout):
        self.rows = x if real is None else x[real.expand(x.shape[:-1])]
        return x


def test_capture_sees_the_values_behind_the_prefix_and_none_of_the_prefix(tiny, tokens):
    plain, changed = tiny(), tiny()
    attach_prefix(changed, PREFIX)
    ids, size = tokens(4, 12), len(PREFIX)
    sites = find_sites(changed)
    sketches = Capture().run(changed, ids, sites, batch=2)
    ports = {site.name: Keep() for site in sites}
    with torch.no_grad(), attached(plain, find_sites(plain), ports):
        plain(behind(ids))
    counts, extremes = sketches.signed_moments()[:, 0], sketches.tensors["range"]
    for site, count, extreme in zip(sites, counts, extremes, strict=True):
        if site.role == "attn.probs":  # of 12 queries on 3 + 1 to 3 + 12 keys
            assert count == 4 * 4 * (12 * size + 12 * 13 // 2)
            continue
        rows = ports[site.name].rows
        rows = rows[:, :, size:] if rows.dim() == 4 else rows[:, size:]
        assert count == rows.numel(), site.name
        assert extreme.tolist() == pytest.approx([float(rows.min()), float(rows.max())], rel=1e-4)


def test_counters_count_new_tokens_and_the_plan_the_keys_they_meet(tiny, tokens, convert):
    model, ids = tiny(), tokens(2, 9)
    attach_prefix(model, PREFIX)
    result = perplexity(model, ids, convert(model, Las("las", 4, "zero")), 2, "text").counters
    values = result.set_index("role").groupby("role")["values"].first()
    pairs = sum(len(PREFIX) + query + 1 for query in range(9))
    assert values["attn.in"] == 2 * 9 * 24
    assert values["attn.q"] == 2 * 9 * 4 * 10
    assert values["attn.k"] == values["attn.v"] == 2 * 9 * 2 * 10
    assert values["attn.probs"] == 2 * 4 * pairs
    macs = result.groupby("role")["macs"].first()
    assert macs["attn.q"] == macs["attn.probs"] == 2 * 4 * 10 * pairs
    kinds = {op.kind: op for op in operations(model, find_sites(model)) if op.layer == 0}
    assert kinds["qk"].prefix == kinds["pv"].prefix == kinds["softmax"].prefix == len(PREFIX)


def test_leaving_a_patch_keeps_the_prefix_and_nothing_else(pair, tokens, convert):
    _, changed = pair
    ids = tokens(2, 9)
    with torch.no_grad():
        before = changed(ids).logits
        with patched(changed, convert(changed, Las("las", 3, "zero"))):
            assert not torch.equal(changed(ids).logits, before)
        assert torch.equal(changed(ids).logits, before)
    assert prefix_length(changed) == len(PREFIX)


# What does not fit


def test_a_mask_or_a_cache_without_room_for_the_prefix_is_refused(tiny, tokens):
    model, ids = tiny(), tokens(2, 6)
    attach_prefix(model, PREFIX)
    first = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, ids], dim=1)
    with pytest.raises(InputError, match="whole text without a cache"):
        model.generate(longer, cache=first.cache, max_new_tokens=2, do_sample=False)
    with pytest.raises(InputError, match="without the prefix"), torch.no_grad():
        model(ids, attention_mask=torch.ones(2, 6 + len(PREFIX), dtype=torch.long))
    with pytest.raises(InputError, match="fixed size"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2, disable_compile=True)
    with pytest.raises(ValueError, match="prefix of 3"):
        attach_prefix(model, PREFIX)
    with torch.no_grad():  # one with room for all of it serves
        cache = StaticCache(config=model.config, max_cache_len=32)
        close(model(ids, cache=cache).logits, model(ids).logits)


SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
ENDS = {
    "mistral": ({"sliding_window": 12}, "window of 12 would leave the prefix"),
    "qwen2": (SLIDING | {"sliding_window": 12}, "window of 12 would leave the prefix"),
    "llama": (
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 12},
        "rope_type 'dynamic' turns longer texts otherwise",
    ),
}


@pytest.mark.parametrize("kind", ENDS)
def test_a_text_that_would_lose_the_prefix_is_refused_everywhere(kind, tiny, tokens):
    more, reason = ENDS[kind]
    plain, changed = tiny(kind, **more), tiny(kind, **more)
    attach_prefix(changed, PREFIX)
    fits, longer = tokens(2, 9), tokens(2, 10)
    left = torch.tensor([[0] * 8 + [1] * 2, [0] + [1] * 9])
    with torch.no_grad():
        close(changed(fits).logits, plain(behind(fits)).logits[:, len(PREFIX) :])
    mask = torch.ones_like(fits)
    for use in (
        lambda: changed(longer),
        lambda: changed(longer, attention_mask=left),
        lambda: changed(longer, attention_mask=left, position_ids=left.cumsum(-1) - 1),
        lambda: perplexity(changed, longer, None, 2, "text"),
        lambda: changed.generate(fits, attention_mask=mask, min_new_tokens=2, max_new_tokens=2),
    ):
        with pytest.raises(InputError, match=reason) as refused, torch.no_grad():
            use()
        assert "give at most 9 tokens" in str(refused.value) and "\n" not in str(refused.value)


# The search


@pytest.fixture
def planted(tiny):
    """A model whose layer-1 MLP is huge on tokens 5 and 9, whatever stands around them."""
    model = tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.zero_()
        width = model.config.hidden_size
        model.model.embed_tokens.weight[:, -1] = 0
        model.model.embed_tokens.weight[[5, 9]] = nn.functional.one_hot(
            torch.tensor([width - 1] * 2), width
        ).float()
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = 0
        mlp.gate_proj.weight[0, -1] = mlp.up_proj.weight[0, -1] = 60
    return model


def window(*outliers: tuple[int, int]) -> list[int]:
    row = [10 + i for i in range(16)]
    for position, token in outliers:
        row[position] = token
    return row


def test_the_search_finds_the_tokens_that_are_planted(planted):
    ids = torch.tensor([window((3, 5), (7, 9)), window((0, 9), (6, 5)), window((2, 5))])
    tokenizer = SimpleNamespace(bos_token_id=48)
    found = PrefixSearch(64).run(planted, tokenizer, ids, batch=2)
    assert found["site"] == "model.layers.1.mlp.down_proj:in"
    assert found["counts"] == {"5": 3, "9": 1}  # 9 in the first position is left out
    assert found["outliers_per_window"][found["site"]] == pytest.approx(5 / 3)
    assert found["first_position"] == pytest.approx(1 / 3)
    assert found["ids"] == [5, 48]  # two, the last of them the BOS
    without = PrefixSearch(64).run(planted, SimpleNamespace(bos_token_id=None), ids, batch=3)
    assert without["ids"] == [5, 9]


def test_a_search_that_finds_nothing_leaves_the_bos_or_says_so(tiny, tokens):
    model, ids = tiny(), tokens(3, 16)
    quiet = PrefixSearch(1e6)
    assert quiet.run(model, SimpleNamespace(bos_token_id=48), ids, batch=2)["ids"] == [48]
    with pytest.raises(InputError, match="no BOS"):
        quiet.run(model, SimpleNamespace(bos_token_id=None), ids, batch=2)


@pytest.mark.parametrize("outlier", [1.0, -3, float("inf")])
def test_an_outlier_stands_out(outlier):
    with pytest.raises(InputError, match="search.outlier"):
        PrefixSearch(outlier)
