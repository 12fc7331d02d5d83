"""The size of products against what a forward pass counts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.evaluation import perplexity
from stages.fits.statistics import Products, widths
from stages.model.sites import Site, find_sites
from stages.statistics import measuring
from tests.conftest import FAMILIES, SLIDING_WINDOW, TINY

LENGTH = 12
Tiny = Callable[..., PreTrainedModel]
ELEMENTWISE = ("mlp.act", "mlp.up")


def measured(model: PreTrainedModel, ids: Tensor) -> tuple[list[Site], dict[str, Tensor]]:
    sites = find_sites(model)
    return sites, measuring(Products())(model, ids, sites, 2)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_multiplications_are_those_that_a_forward_pass_counts(
    tiny: Tiny, tokens: Callable[..., Tensor], kind: str
) -> None:
    """Grouped heads, sliding windows, experts (of which those of a layer share what a token meets)."""
    model, ids = tiny(kind), tokens(3, LENGTH)
    sites, size = measured(model, ids)
    counted = perplexity(model, ids, None, 2, "text").counters.set_index("site")["macs"]
    a_token, by_operand = counted / ids.numel(), dict.fromkeys([s.operand for s in sites], 0.0)
    expected = dict(by_operand)
    for site, macs in zip(sites, size["macs"].tolist(), strict=True):
        by_operand[site.operand] += macs
        expected[site.operand] += 0 if site.role in ELEMENTWISE else a_token[site.name]
    assert by_operand == pytest.approx(expected)
    parts = zip(sites, size["macs"].tolist(), strict=True)
    shares = [macs for s, macs in parts if s.expert is not None and s.role == "mlp.down"]
    assert len(set(shares)) == bool(shares) and all(share > 0 for share in shares)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "opt", "mixtral"])
def test_the_width_is_what_an_accumulator_adds_up(
    tiny: Tiny, tokens: Callable[..., Tensor], kind: str
) -> None:
    sites, size = measured(tiny(kind), tokens(3, LENGTH))
    width, hidden = widths(size), TINY["hidden_size"]
    head = 6 if kind == "opt" else TINY["head_dim"]
    inner = TINY["intermediate_size"]
    for site, each in zip(sites, width.tolist(), strict=True):
        slides = kind == "mistral" or (kind == "gemma3_text" and site.layer == 0)
        seen = [min(t + 1, SLIDING_WINDOW if slides else LENGTH) for t in range(LENGTH)]
        wide = {
            **dict.fromkeys(("attn.in", "mlp.in", "head.in"), hidden),
            **dict.fromkeys(("attn.q", "attn.k"), head),
            **dict.fromkeys(("attn.probs", "attn.v"), sum(seen) / LENGTH),
            **dict.fromkeys(ELEMENTWISE, 0),
            "attn.out": 4 * head,
            "mlp.down": inner,
        }
        assert each == pytest.approx(wide[site.role]), site.name


def test_windows_behind_a_prefix_see_it(
    tiny: Tiny, tokens: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens in front: a query at t sees t + 3 keys."""
    model, ids = tiny("llama"), tokens(3, LENGTH)
    monkeypatch.setattr("stages.analysis.operations.prefix_length", lambda model: 2)
    sites, size = measured(model, ids)
    probs = [i for i, site in enumerate(sites) if site.role == "attn.probs"]
    mean = sum(t + 3 for t in range(LENGTH)) / LENGTH
    assert widths(size)[probs].tolist() == pytest.approx([mean] * len(probs))
    assert torch.equal(size["macs"][probs], size["accumulators"][probs] * mean)
