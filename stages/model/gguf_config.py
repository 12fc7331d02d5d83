"""What a GGUF file says of its model, beside the config that transformers makes of it.

transformers takes some of a file's numbers and leaves the others at the defaults of the family, which
are one checkpoint's: a file that says otherwise would be another model without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from stages.errors import InputError

# Families whose files a test has read: logits like those of the model that the file was made of.
READ: tuple[str, ...] = ("bloom", "falcon", "gemma2", "gemma3", "gpt2", "llama", "nemotron", "phi3")
READ += ("qwen2", "qwen2moe", "qwen3", "qwen3moe", "stablelm", "starcoder2")
# Decided by the shapes of tensors, which are compared, or of no effect on what the model computes.
_SHAPES = {"context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"}
_SHAPES |= {"expert_count", "expert_feed_forward_length", "expert_shared_feed_forward_length"}
_SHAPES |= {"tensor_data_layout", "rope.scaling.finetuned", "expert_shared_count"}
# Of these the scores are divided by the root of hidden_size / heads instead of that of a head's width.
_LARGEST = {("gemma2", 46), ("gemma3", 62)}


def check_stated(config: Any, metadata: Mapping[str, Any], architecture: str, source: str) -> None:
    """Raise InputError where the file says of its model what is not in the config made of it."""
    if architecture not in READ:
        raise InputError(
            f"{source}: files of {architecture} are not read here (read: {', '.join(READ)}); give the "
            "original model by model.path=FOLDER"
        )
    prefix = f"{architecture}."
    stated = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    for key in sorted(stated.keys() - _SHAPES):
        there, made = stated[key], _READERS.get(key, _unknown)(config)
        if not _same(key, there, made):
            with_it = "nothing" if made is None else f"{made!r}"
            raise InputError(
                f"{source}: it says {prefix}{key}={there!r}, and transformers makes {with_it} of it; "
                "give the original model by model.path=FOLDER"
            )
    if architecture.startswith("gemma"):
        _check_scale(config, architecture, source)


def _same(key: str, there: Any, made: Any) -> bool:
    """Whether the file's number and the config's are one; None is what the family has not."""
    if isinstance(there, str) or isinstance(made, str):
        return there == made
    if isinstance(there, (list, tuple)):
        return set(there) == {made}
    if key == "attention.sliding_window" and not made:
        return not there  # Phi-3's without one say 0
    return made is not None and math.isclose(there, made, rel_tol=1e-6)


def _check_scale(config: Any, architecture: str, source: str) -> None:
    """Of Gemma the file leaves out what scores are divided by; llama.cpp knows it by the layers."""
    largest = (architecture, config.num_hidden_layers) in _LARGEST
    wanted = config.hidden_size / config.num_attention_heads if largest else config.head_dim
    if config.query_pre_attn_scalar != wanted:
        raise InputError(
            f"{source}: scores of its {config.num_hidden_layers} layers are divided by the root of "
            f"{wanted:g}, and transformers divides by that of {config.query_pre_attn_scalar:g}; give "
            "the original model by model.path=FOLDER"
        )


def _unknown(config: Any) -> None:
    return None


def _named(*names: str) -> Callable[[Any], Any]:
    """Read the first of these that the config has."""

    def read(config: Any) -> Any:
        return next((v for name in names if (v := getattr(config, name, None)) is not None), None)

    return read


def _rope(name: str) -> Callable[[Any], Any]:
    """Read a parameter of the rotary embedding; of layers that see all tokens where there are two."""

    def read(config: Any) -> Any:
        ropes = getattr(config, "rope_parameters", None) or {}
        return ropes.get("full_attention", ropes).get(name)

    return read


def _rope_type(config: Any) -> str:
    kind = _rope("rope_type")(config)
    return "none" if kind in (None, "default") else str(kind)


def _head(config: Any) -> int:
    made = getattr(config, "head_dim", None)
    return int(made or config.hidden_size // config.num_attention_heads)


def _keys(config: Any) -> int:
    """Heads of keys."""
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else int(config.num_attention_heads)
    made = _named("num_kv_heads" if config.model_type == "falcon" else "num_key_value_heads")(
        config
    )
    return int(made or config.num_attention_heads)


def _rotated(config: Any) -> int:
    """The part of a head that carries its position."""
    share = _rope("partial_rotary_factor")(config)
    return int(_head(config) * (1.0 if share is None else share))


_READERS: dict[str, Callable[[Any], Any]] = {
    "attention.head_count": _named("num_attention_heads"),
    "attention.head_count_kv": _keys,
    "attention.key_length": _head,
    "attention.value_length": _head,
    "attention.layer_norm_epsilon": _named(
        "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"
    ),
    "attention.layer_norm_rms_epsilon": _named("rms_norm_eps"),
    "attention.sliding_window": _named("sliding_window"),
    "attn_logit_softcapping": _named("attn_logit_softcapping"),
    "final_logit_softcapping": _named("final_logit_softcapping"),
    "expert_used_count": _named("num_experts_per_tok"),
    "use_parallel_residual": _named("use_parallel_residual"),
    "rope.dimension_count": _rotated,
    "rope.freq_base": _rope("rope_theta"),
    "rope.scaling.type": _rope_type,
    "rope.scaling.factor": _rope("factor"),
    "rope.scaling.original_context_length": _named(
        "original_max_position_embeddings", "max_position_embeddings"
    ),
}
