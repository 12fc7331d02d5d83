"""The dimensions of a decoder layer, read off its modules where they tell them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.model.sites import Site, fused, key_heads, matrix


class Chunk(int):
    """The length of chunks, where a query sees the keys of its own chunk alone (Llama 4)."""


@dataclass(frozen=True)
class Shape:
    """The dimensions of one decoder layer; `width` is that of a head of queries and keys, `value` that
    of its values, `rotated` dimensions of all heads carry the position; `inner` is all that a token
    meets, in `routes` of so many `experts`."""

    hidden: int
    inner: int
    heads: int
    groups: int
    width: int
    value: int
    rotated: int
    window: int | None
    prefix: int
    experts: int
    routes: int


def shape_of(
    config: Any, modules: Mapping[str, Any], roles: Mapping[str, Site], prefix: int
) -> Shape:
    """Return the dimensions of the layer of `roles`."""
    attention = modules[roles["attn.q"].path]
    out, down = (
        matrix(modules[roles[role].consumers[0]], roles[role], config)
        for role in ("attn.out", "mlp.down")
    )
    heads = config.num_attention_heads
    groups = key_heads(attention, heads)
    value = out.inputs // heads
    width = getattr(attention, "qk_head_dim", value)
    layer = roles["attn.q"].layer
    window = _window(config, layer, attention)
    # One rotated part of keys is shared by all heads where keys come from latents.
    keys = 1 if hasattr(attention, "qk_rope_head_dim") else groups
    rotated = (heads + keys) * _rotated(config, layer, width, attention)
    rotated = rotated if _has_rope(config, attention, window) else 0
    experts = modules[roles["mlp.down"].path]
    number = experts.num_experts if fused(experts) else 0
    routes = config.num_experts_per_tok if number else 0
    hidden, inner = out.outputs, down.inputs
    head = (heads, groups, width, value, rotated)
    return Shape(hidden, inner, *head, window, prefix, number, routes)


def _window(config: Any, layer: int, attention: Any) -> int | None:
    """Keys that a query of a layer sees: its kind of layer says it (Qwen2), or its attention, or the
    configuration for all (Mistral)."""
    if getattr(attention, "attention_type", None) == "local":  # GPT-Neo
        return int(config.window_size)
    kinds = getattr(config, "layer_types", None)
    of_all: int | None = getattr(config, "sliding_window", None)
    if kinds is not None and kinds[layer] == "chunked_attention":
        return Chunk(config.attention_chunk_size)
    if kinds is not None:
        return of_all if kinds[layer] == "sliding_attention" else None
    window: int | None = getattr(attention, "sliding_window", of_all)
    return window


def _has_rope(config: Any, attention: Any, window: int | None) -> bool:
    """Return whether a layer rotates queries and keys: some of SmolLM3's and Llama 4's do not, nor
    those of Cohere 2 and EXAONE 4 that see all keys where others see a window."""
    if getattr(config, "alibi", False):  # Falcon has the parameters all the same
        return False
    if config.model_type in ("cohere2", "exaone4"):
        mixed = config.sliding_window is not None or config.model_type == "cohere2"
        return window is not None or not mixed
    return bool(getattr(attention, "use_rope", True))


def _rotated(config: Any, layer: int, width: int, attention: Any) -> int:
    """Dimensions of a head that carry its position: all, a part, or none where it is added."""
    if hasattr(attention, "qk_rope_head_dim"):  # the rest of a head comes from latents
        return int(attention.qk_rope_head_dim)
    rope = getattr(config, "rope_parameters", None)
    if not rope:  # GPT-J says it by itself
        return int(getattr(config, "rotary_dim", None) or 0)
    if "rope_type" not in rope:  # one for every type of layer
        rope = rope[config.layer_types[layer]]
    return int(width * rope.get("partial_rotary_factor", 1.0))
