"""Attention of families that multiply queries and keys by themselves, through ported attention, and
mixtures whose experts transformers calls in a way of their own.

Each function is the forward pass of one class of transformers in which the products are those of
`scored_attention` or `ported_experts`; it stands in for that of the module while ports are attached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.model.rules import REWRITTEN, REWRITTEN_EXPERTS
from stages.ports.attention import NAME
from stages.ports.experts import ported_experts
from stages.ports.scores import scored_attention


def gpt_neo(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    layer_past: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """GPT-Neo: scores are not scaled, and every other layer sees a window of keys."""
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (
        module._split_heads(each(hidden_states), module.num_heads, module.head_dim)
        for each in projections
    )
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_id)
    queries, keys = query.shape[-2], key.shape[-2]
    mask = attention_mask & module.bias[:, :, keys - queries : keys, :keys]
    dropout = _dropout(module, module.attn_dropout)
    output, _ = scored_attention(module, query, key, value, mask, 1.0, dropout)
    return module.resid_dropout(module.out_proj(output.flatten(2))), None


def bloom(
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,  # [B · H, 1, K]
    attention_mask: Tensor,
    layer_past: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """BLOOM: ALiBi, a bias of every key that grows with its position."""
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    bias = alibi.view(len(hidden_states), module.num_heads, 1, -1)
    scaling, dropout = module.inv_norm_factor, _dropout(module, module.attention_dropout)
    output, _ = scored_attention(
        module, query, key, value, attention_mask, scaling, dropout, bias=bias
    )
    written = nn.functional.dropout(
        module.dense(output.flatten(2)), module.hidden_dropout, module.training
    )
    return residual + written, None


def mpt(
    module: Any,
    hidden_states: Tensor,
    position_bias: Tensor,  # [H, 1, positions]
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """MPT: ALiBi, and queries, keys and values that may be clipped."""
    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(-module.clip_qkv, module.clip_qkv)
    shape = (*hidden_states.shape[:2], module.n_heads, module.head_dim)
    query, key, value = (each.reshape(shape).transpose(1, 2) for each in mixed.chunk(3, 2))
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    bias = position_bias[None, :, :, max(0, position_bias.shape[-1] - key.shape[-2]) :]
    dropout = module.attn_dropout_p if module.training else 0.0
    output, _ = scored_attention(
        module, query, key, value, attention_mask, module.softmax_scale, dropout, bias=bias
    )
    return module.out_proj(output.flatten(2)), None


def falcon(
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,  # [B, H, 1, K]
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Falcon: RoPE or ALiBi, one key head or some, which are not repeated for their queries."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    groups = module.num_kv_heads
    mixed = module.query_key_value(hidden_states)
    if module.new_decoder_architecture or not module.multi_query:
        each = module.num_heads // groups  # query heads of a key head
        mixed = mixed.view(*mixed.shape[:2], groups, each + 2, module.head_dim)
        query, key, value = mixed[..., :-2, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
    else:
        mixed = mixed.view(*mixed.shape[:2], module.num_heads + 2, module.head_dim)
        query, key, value = mixed.split((module.num_heads, 1, 1), 2)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mask, bias = attention_mask, None
    if alibi is None:
        assert position_embeddings is not None
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    else:  # the mask is the scaled bias where a key is seen
        bias = alibi * module.inv_norm_factor
        mask = (attention_mask > torch.finfo(attention_mask.dtype).min / 2)[:, :1]
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    dropout = _dropout(module, module.attention_dropout)
    output, _ = scored_attention(
        module, query, key, value, mask, module.inv_norm_factor, dropout, bias=bias
    )
    return module.dense(output.flatten(2)), None


def llama4_moe(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4: experts see their tokens times the router's score, and no others."""
    hidden = hidden_states.reshape(-1, module.hidden_dim)
    scores, logits = module.router(hidden)
    weights, experts = scores.topk(module.top_k, -1)
    routed = ported_experts(module.experts, hidden, experts, weights, inputs_weighted=True)
    return module.shared_expert(hidden) + routed, logits


_FORWARD: dict[str, Callable[..., tuple[Tensor, Any]]] = {
    "Llama4TextMoe": llama4_moe,
    "GPTNeoSelfAttention": gpt_neo,
    "BloomAttention": bloom,
    "MptAttention": mpt,
    "FalconAttention": falcon,
}
assert set(_FORWARD) == {*REWRITTEN, *REWRITTEN_EXPERTS}


def _dropout(module: nn.Module, dropout: Any) -> float:
    return float(dropout.p) if module.training else 0.0


@contextmanager
def rewritten(
    model: PreTrainedModel, attention: Sequence[nn.Module], experts: bool
) -> Iterator[None]:
    """Let attention, and experts where they have ports, go through them while the context is open.

    transformers sets the implementation of those alone that go through its AttentionInterface.
    """
    before = model.config._attn_implementation
    own = [module for module in attention if type(module).__name__ in REWRITTEN]
    if experts:
        own += [m for m in model.modules() if type(m).__name__ in REWRITTEN_EXPERTS]
    # Where accelerate has placed layers, it calls this instead of the forward that is replaced.
    names = ["_old_forward" if hasattr(module, "_old_forward") else "forward" for module in own]
    kept = [module.__dict__.get(name) for module, name in zip(own, names, strict=True)]
    collected = False
    try:
        _choose(model, attention, NAME)
        for module, name in zip(own, names, strict=True):
            module.__dict__[name] = partial(_FORWARD[type(module).__name__], module)
        yield
    except GeneratorExit:
        collected = True  # nobody has this model any more, but its config may be that of another
        raise
    finally:
        if not collected:
            _choose(model, attention, before)
            for module, name, forward in zip(own, names, kept, strict=True):
                if forward is None:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = forward


def _choose(model: PreTrainedModel, attention: Sequence[nn.Module], name: str) -> None:
    """Choose the implementation of attention, which makes the mask, too."""
    if any(type(module).__name__ in REWRITTEN for module in attention):
        model.config._attn_implementation_internal = name
    else:
        model.set_attn_implementation(name)
