"""What stands between scores and softmax, against softmaxes that are written out, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.errors import InputError
from stages.model.sites import find_sites
from stages.ports.attention import NAME
from stages.ports.hooks import attached
from stages.ports.port import DensePort
from stages.ports.scores import capped, outside_sink, scored_attention
from tests.model.families import made

Draws = Callable[..., Tensor]


def test_a_soft_cap_bounds_scores_and_leaves_small_ones() -> None:
    scores = torch.tensor([-1e4, -0.01, 0.0, 0.01, 1e4], dtype=torch.float64)
    found = capped(scores, 30.0)
    torch.testing.assert_close(found[[0, 4]], torch.tensor([-30.0, 30.0], dtype=torch.float64))
    torch.testing.assert_close(found[1:4], scores[1:4], rtol=1e-5, atol=0)


def test_a_sink_leaves_the_share_of_a_softmax_with_one_more_term() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, sink = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(3, generator=generator)
    mask = torch.ones(4, 5).tril(1).bool().expand(2, 1, 4, 5)
    allowed = torch.where(mask, scores, -torch.inf)
    column = sink.view(1, 3, 1, 1).expand(2, 3, 4, 1)
    whole = torch.cat([allowed, column], -1).softmax(-1)[..., :-1]
    share = outside_sink(scores, sink, mask)
    torch.testing.assert_close(allowed.softmax(-1) * share, whole)
    torch.testing.assert_close(share, whole.sum(-1, keepdim=True))


def attention(model: Any, width: int = 6, values: int = 6, **more: Any) -> Tensor:
    """One pass of ported attention of the first layer over 3 tokens of random queries and keys."""
    module = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, n, 3, width, generator=generator) for n in (4, 2))
    value = torch.randn(1, 2, 3, values, generator=generator)
    mask = torch.ones(1, 1, 3, 3).tril().bool()
    with attached(model, find_sites(model), {}):
        return scored_attention(module, query, key, value, mask, 0.5, **more)[0]


@pytest.mark.parametrize("values", [2, 6])
def test_a_bias_of_keys_and_narrow_values_are_those_of_plain_attention(values: int) -> None:
    bias = torch.randn(1, 4, 1, 3, generator=torch.Generator().manual_seed(1))
    found = attention(made("smollm3"), values=values, bias=bias)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, n, 3, 6, generator=generator) for n in (4, 2))
    value = torch.randn(1, 2, 3, values, generator=generator).repeat_interleave(2, 1)
    hidden = torch.ones(3, 3).triu(1).bool()
    scores = (query @ key.repeat_interleave(2, 1).mT * 0.5 + bias).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ value).transpose(1, 2))


def test_what_attention_does_not_compute_is_refused_by_name() -> None:
    model = made("smollm3")
    with pytest.raises(InputError, match="SmolLM3Attention gives attention position_bias, which"):
        attention(model, position_bias=torch.zeros(1))
    with pytest.raises(InputError, match="values wider than its queries"):
        attention(model, values=8)
    attention(model, position_ids=torch.arange(3), output_attentions=False)


class AboutMeans(DensePort):
    """Leaves out a mean of keys, as the codes of some sites do."""

    def constant(self, x: Tensor) -> Tensor | None:
        return x.new_ones(x.shape[1], 1, x.shape[3])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "smollm3"])
def test_keys_about_their_means_are_refused_where_a_softmax_sees_a_shift(
    name: str, tokens: Draws
) -> None:
    model = made(name)
    sites = find_sites(model)
    ports = {site.name: AboutMeans() for site in sites if site.role == "attn.k"}
    with torch.no_grad(), attached(model, sites, ports):
        if name == "smollm3":  # a plain softmax does not
            model(tokens(1, 5))
            return
        with pytest.raises(InputError, match="soft-cap or a sink.*coding.centre=none"):
            model(tokens(1, 5))


@pytest.mark.parametrize("name", ["gpt_neo", "bloom", "mpt", "falcon", "llama4_text"])
def test_what_is_rewritten_is_transformers_own_again(name: str, tokens: Draws) -> None:
    model = made(name)
    before = dict(model.config.to_dict())
    with attached(model, find_sites(model), {}):
        assert model.config._attn_implementation == NAME
        assert any("forward" in module.__dict__ for module in model.modules())
    assert model.config._attn_implementation == "eager" and model.config.to_dict() == before
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_dropout_of_a_model_in_training_is_refused(tokens: Draws) -> None:
    for name, option in (("bloom", "attention_dropout"), ("falcon", "attention_dropout")):
        model = made(name, **{option: 0.1}).train()
        with attached(model, find_sites(model), {}), pytest.raises(InputError, match="model.eval"):
            model(tokens(1, 4))
