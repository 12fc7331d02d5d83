"""A pass depends on its text alone: not on pads beside it, not on what the process ran before."""

from __future__ import annotations

import pytest
import torch

from stages.capture import Capture
from stages.codings.las import Las
from stages.errors import InputError
from stages.evaluation import negative_log_likelihood, perplexity
from stages.model.loading import load, load_offloaded
from stages.model.offload import Offload
from stages.model.sites import find_sites
from stages.ports.counters import Counters
from stages.ports.patched import patched

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
KINDS = {"llama": DYNAMIC, "gemma3_text": {"full_attention": DYNAMIC, "sliding_attention": PLAIN}}
TRAINED = 16  # the lengths below are as long and longer


@pytest.fixture(params=KINDS)
def folder(request, tiny, byte_tokenizer, tmp_path):
    """A model whose RoPE follows the length of a text."""
    rope = {"rope_parameters": KINDS[request.param], "max_position_embeddings": TRAINED}
    tiny(request.param, **rope).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


WHERE = {"dtype": "float32", "device": "cpu", "revision": None}


def whole(folder):
    return load(folder, **WHERE, device_map=None)[0]


@pytest.mark.parametrize("length", [TRAINED, 24])
@pytest.mark.parametrize("place", ["memory", "files"])
def test_dynamic_rope_is_that_of_a_fresh_process(folder, tokens, length, place):
    ids, longer = tokens(3, length), tokens(2, 40)
    plain = whole(folder)
    with torch.no_grad():
        want = negative_log_likelihood(plain(ids).logits, ids).sum().item() / (3 * (length - 1))
        plain(longer)
        leaked = negative_log_likelihood(plain(ids).logits, ids).sum().item() / (3 * (length - 1))
    assert leaked != pytest.approx(want, rel=2e-5)  # what transformers alone would measure
    model = (
        whole(folder)
        if place == "memory"
        else load_offloaded(folder, **WHERE, offload=Offload("memory"))[0]
    )
    sketch = Capture().run(model, ids, find_sites(model), 2).tensors
    for before in (longer, tokens(1, 30), ids):
        perplexity(model, before, None, 2, "text")
        assert perplexity(model, ids, None, 2, "text").metrics["nll"] == pytest.approx(want)
        perplexity(model, before, None, 2, "text")
        again = Capture().run(model, ids, find_sites(model), 2).tensors
        assert all(torch.equal(again[name], value) for name, value in sketch.items())


def test_a_cached_text_goes_on_with_its_frequencies(folder, tokens):
    """Keys in a cache are rotated already; only a new text starts afresh."""
    plain, model, ids = whole(folder), whole(folder), tokens(1, 20)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = plain.generate(ids, **options)
    with patched(model, None), torch.no_grad():
        model(tokens(1, 60))
        assert torch.equal(model.generate(ids, **options), want)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "opt", "mixtral"])
def test_a_text_spikes_the_same_beside_pads(tiny, tokens, convert, kind, side):
    model, text, pads = tiny(kind), tokens(1, 5), torch.full((1, 7), 49)
    mask = torch.tensor([[1] * 5 + [0] * 7])
    ids = torch.cat([text, pads], 1)
    if side == "left":
        ids, mask = torch.cat([pads, text], 1), mask.flip(-1)
    real = mask[0].bool()
    sites = find_sites(model)
    alone, beside = Counters(sites, "cpu"), Counters(sites, "cpu")
    conversion = convert(model, Las("las_rounded", 5, "half_step"))
    coded = set(conversion.neurons.sites)
    with torch.no_grad():
        with patched(model, conversion, alone):
            want = model(text).logits[0]
        with patched(model, conversion, beside):
            got = model(ids, attention_mask=mask).logits[0, real]
            decoded = model.get_decoder()(ids, attention_mask=mask).last_hidden_state[0, real]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    spikes = [c.frame(coded).set_index("site")["spikes"] for c in (alone, beside)]
    head = next(site.name for site in sites if site.role == "head.in")
    assert (2 * spikes[0].drop(head)).equals(spikes[1].drop(head))  # `beside` has two passes
    assert decoded.shape[0] == 5


def test_counters_do_not_guess_pads_from_a_prepared_mask(tiny, tokens, convert):
    model, ids = tiny(), tokens(2, 9)
    conversion = convert(model, Las("las", 4, "zero"))
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    static = options | {"cache_implementation": "static"}
    with patched(model, conversion):
        assert torch.equal(model.generate(ids, **static), model.generate(ids, **options))
    counters = Counters(find_sites(model), "cpu")
    with (
        patched(model, conversion, counters),
        pytest.raises(InputError, match="counters need an attention_mask"),
    ):
        model.generate(ids, **static)
