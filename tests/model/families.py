"""Random models of families without a file of rules, with odd settings of their configurations.

`python -m tests.model.families` prints the table of stages/README.md.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from stages.model.sites import find_sites
from stages.ports.hooks import attached
from stages.ports.port import DensePort

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "pad_token_id": 49,
}
WINDOW = 5
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
ABSENT = object()  # what a configuration has no name for
# Heads as wide as hidden_size / num_attention_heads, each with keys of its own.
UNGROUPED = {"head_dim": ABSENT, "num_key_value_heads": ABSENT}
ALIBI = UNGROUPED | {"max_position_embeddings": ABSENT, "intermediate_size": ABSENT}
WIDE = {"hidden_size": 32, "head_dim": 8}  # whose heads are hidden_size / num_attention_heads wide
ABSENT_HEAD = {"head_dim": ABSENT, "num_key_value_heads": 4}
LATENT = {"kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
LATENT |= {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT |= {"n_group": 2, "n_shared_experts": 2}
# Options that are sizes alone.
SIZES = {"n_inner", "ffn_dim", "ffn_hidden_size", "num_local_experts", "num_experts", "max_seq_len"}
SIZES |= {"num_experts_per_tok", "shared_expert_intermediate_size", "intermediate_size_mlp"}
SIZES |= {*LATENT, "q_lora_rank"}


def partial(share: float) -> dict[str, Any]:
    """A part of every head alone carries its position."""
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": share,
        }
    }


# `model_type`, with a number where a family has more than one row, and what it needs beside TINY.
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 14},
    "olmo": {"clip_qkv": 2.0, "attention_bias": True, "rope_parameters": LINEAR},
    "olmo2": {"attention_bias": True},
    "olmo3": SLIDING | {"rope_parameters": YARN},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "clip_qkv": 3.0}
    | {"head_dim": 6},
    "smollm3": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "smollm3 2": {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": WINDOW},
    "stablelm": partial(0.5) | WIDE | {"use_qkv_bias": True},
    "stablelm 2": partial(0.25) | WIDE | {"qk_layernorm": True, "use_parallel_residual": True},
    "starcoder2": {"sliding_window": WINDOW, "use_bias": True},
    "starcoder2 2": {"use_bias": False, "tie_word_embeddings": True, "sliding_window": None},
    "phi": partial(0.4),
    "phi 2": partial(0.5) | WIDE | {"qk_layernorm": True},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True}
    | {"lm_head_bias": True, "sliding_window": WINDOW},
    "cohere": {"logit_scale": 0.3, "tie_word_embeddings": True},
    "cohere 2": {"use_qk_norm": True, "attention_bias": True},
    "cohere2": SLIDING | {"logit_scale": 0.3},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 3.0}
    | {"embedding_multiplier": 2.0, "attention_bias": True, "mlp_bias": True},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.4}
    | {"attention_multiplier": 0.2, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "glm4": partial(0.6) | {"attention_bias": True},
    "exaone4": SLIDING | {"sliding_window_pattern": 2},
    "exaone4 2": {"sliding_window": None, "layer_types": ["full_attention"] * 2}
    | {"tie_word_embeddings": True},
    "nemotron": partial(0.6) | {"attention_bias": True, "mlp_bias": True},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "gpt2": UNGROUPED
    | {"n_inner": 20, "scale_attn_by_inverse_layer_idx": True}
    | {"tie_word_embeddings": True},
    "gpt2 2": UNGROUPED | {"scale_attn_weights": False, "reorder_and_upcast_attn": True},
    "gpt_bigcode": UNGROUPED | {"n_inner": 20, "multi_query": True},
    "gpt_bigcode 2": UNGROUPED | {"multi_query": False, "tie_word_embeddings": True},
    "gptj": UNGROUPED | {"n_inner": 20, "rotary_dim": 4},
    "gptj 2": UNGROUPED | {"rotary_dim": 6},
    "gpt_neo": UNGROUPED | {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "bloom": ALIBI | {"apply_residual_connection_post_layernorm": True},
    "bloom 2": ALIBI | {"num_attention_heads": 3, "tie_word_embeddings": True},
    "mpt": ALIBI
    | {"max_seq_len": 64, "num_attention_heads": 3}
    | {"attn_config": {"clip_qkv": 2.0, "softmax_scale": 0.3}},
    "falcon": UNGROUPED
    | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
    | {"ffn_hidden_size": 20},
    "falcon 2": UNGROUPED | {"multi_query": True, "parallel_attn": True},
    "falcon 3": UNGROUPED
    | {"alibi": True, "multi_query": False, "parallel_attn": False}
    | {"bias": True},
    "falcon 4": UNGROUPED
    | {"new_decoder_architecture": True, "num_kv_heads": 1}
    | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": True},
    "gemma2": SLIDING
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    | {"query_pre_attn_scalar": 14},
    "opt": UNGROUPED | {"ffn_dim": 20, "word_embed_proj_dim": 12, "do_layer_norm_before": False},
    "opt 2": UNGROUPED
    | {"ffn_dim": 20, "word_embed_proj_dim": 30, "enable_bias": False}
    | {"tie_word_embeddings": True},
    "deepseek_v3": ABSENT_HEAD
    | LATENT
    | {"q_lora_rank": 14, "rope_parameters": YARN}
    | {"first_k_dense_replace": 1, "topk_group": 1},
    "deepseek_v3 2": ABSENT_HEAD
    | LATENT
    | {"q_lora_rank": None, "first_k_dense_replace": 0}
    | {"rope_interleave": False, "topk_group": 2, "attention_bias": True},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 16}
    | {"moe_layers": [1], "no_rope_layers": [1, 0], "attention_chunk_size": 6, "use_qk_norm": True},
    "llama4_text 2": {"num_local_experts": 4, "num_experts_per_tok": 2, "use_qk_norm": False}
    | {"attention_bias": True, "attention_chunk_size": None, "tie_word_embeddings": True},
    "gpt_oss": SLIDING
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 1.5}
    | {"rope_parameters": YARN},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    | {"shared_expert_intermediate_size": 28, "mlp_only_layers": [0]},
}


def made(name: str, seed: int = 0, attention: str = "eager", **more: Any) -> Any:
    """Make a model of a row of FAMILIES, norms and biases random like weights."""
    torch.manual_seed(seed)
    kind = name.partition(" ")[0]
    options = TINY | FAMILIES[name] | more
    given = {option: value for option, value in options.items() if value is not ABSENT}
    config = AutoConfig.for_model(kind, **given)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases start as ones and zeros, which hides mistakes
            scale = ("norm" in path or "ln_" in path) and path.endswith("weight")
            torch.nn.init.normal_(parameter, mean=float(scale), std=0.2)
        elif parameter.dim() == 3 or "router" in path or path.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def difference(name: str, model: Any, ids: Tensor) -> float:
    """The largest difference of logits between ports and transformers, by the largest logit.

    transformers' eager attention of Falcon adds ALiBi twice, its default (SDPA) once.
    """
    twice = model.config.model_type == "falcon" and model.config.alibi
    sites = find_sites(model)
    with torch.no_grad():
        before = model(ids).logits
        with attached(model, sites, {site.name: DensePort() for site in sites}):
            found = model(ids).logits
        assert torch.equal(model(ids).logits, before)
        expected = made(name, attention="sdpa")(ids).logits if twice else before
    return float((found - expected).abs().max() / expected.abs().max())


def settings(kind: str) -> str:
    """What the rows of a family set beside its sizes."""
    rows = [options for name, options in FAMILIES.items() if name.partition(" ")[0] == kind]
    names = dict.fromkeys(
        f"`{option}`"
        for options in rows
        for option, value in options.items()
        if value is not ABSENT and option not in TINY and option not in SIZES
    )
    tied = any(options.get("tie_word_embeddings") for options in rows)
    return " ".join([*names, *["tied"] * tied])


def table() -> Iterator[str]:
    """The rows of the table: family, settings, the largest difference of its models, rounded up."""
    ids = torch.randint(0, 48, (2, 20), generator=torch.Generator().manual_seed(0))
    for kind in sorted({name.partition(" ")[0] for name in FAMILIES}):
        names = [name for name in FAMILIES if name.partition(" ")[0] == kind]
        most = max(difference(name, made(name), ids) for name in names)
        yield f"| `{kind}` | {settings(kind)} | {rounded(most)} |"


def rounded(value: float) -> str:
    """One digit, rounded up."""
    if value == 0:
        return "0"
    power = math.floor(math.log10(value))
    digit = math.ceil(value / 10**power)
    return f"{digit}e{power}" if digit < 10 else f"1e{power + 1}"


if __name__ == "__main__":
    print("\n".join(table()))
