"""Tiny GGUF files of every family that transformers reads, as llama.cpp's converter lays them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from tests.conftest import FAMILIES as RULED
from tests.model import families

Tensors = dict[str, Tensor]
# The config's names of what a file calls by one name in every family.
KEYS = {
    "context_length": ("max_position_embeddings", "n_positions", "seq_length"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": (
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_epsilon",
        "norm_eps",
    ),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "use_parallel_residual": ("use_parallel_residual",),
}


@dataclass(frozen=True)
class Family:
    """`kind` and `options`: of the model; `keys`: what its files have beside KEYS, or instead (None:
    not in them); `change`: what a tensor becomes, by its name in the model."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[str, Tensor, Any], Tensors] = lambda name, weight, config: {name: weight}
    pre: str = "gpt-2"

    def model(self) -> Any:
        """A random one, its heads of 8."""
        size = {"hidden_size": 32, "head_dim": 8, "vocab_size": 258, "num_key_value_heads": 2}
        given = families.FAMILIES.get(self.kind, RULED.get(self.kind, {}))
        absent = {
            key: families.ABSENT
            for key in size
            if given.get(key) in (None, families.ABSENT) and key in given
        }
        families.FAMILIES.setdefault(self.kind, given)
        return families.made(self.kind, **{**size, **absent, **self.options})


def interleaved(name: str, weight: Tensor, config: Any) -> Tensors:
    """The rows of q and k, whose two halves rotate together, in turn."""
    for port, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if port in name:
            halves = weight.unflatten(0, (getattr(config, heads), 2, -1))
            weight = halves.transpose(1, 2).flatten(0, 2)
    return {name: weight}


def shifted(name: str, weight: Tensor, config: Any) -> Tensors:
    """Norms that multiply by 1 + w."""
    return {name: weight + 1 if name.endswith("norm.weight") else weight}


def shifted_all(name: str, weight: Tensor, config: Any) -> Tensors:
    """Nemotron's, with their biases as they are."""
    return {name: weight + 1 if "norm" in name and name.endswith("weight") else weight}


def transposed(name: str, weight: Tensor, config: Any) -> Tensors:
    return {name: weight.T if weight.dim() == 2 and ".c_" in name else weight}


def experts(name: str, weight: Tensor, config: Any) -> Tensors:
    """Gates and the projections up apart."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = weight.chunk(2, 1)
        path = name.removesuffix("gate_up_proj")
        return {f"{path}gate_proj.weight": gate, f"{path}up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": weight}
    return {name: weight[0] if name.endswith("shared_expert_gate.weight") else weight}


def by_port(name: str, weight: Tensor, config: Any) -> Tensors:
    """BLOOM's q, k and v, which are in turn in every head, as one block each."""
    if "query_key_value" in name:
        weight = weight.unflatten(0, (config.n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
    return {name: weight}


def by_group(name: str, weight: Tensor, config: Any) -> Tensors:
    """Falcon's likewise: queries of a group of heads, their key and their value."""
    if "query_key_value" in name:
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
        groups = (
            groups
            if config.new_decoder_architecture or config.multi_query
            else config.num_attention_heads
        )
        parts = weight.unflatten(0, (groups, -1, config.hidden_size // config.num_attention_heads))
        ports = (parts[:, :-2], parts[:, -2:-1], parts[:, -1:])
        weight = torch.cat([port.flatten(0, 2) for port in ports])
    return {name: weight}


def rope(width: int) -> dict[str, int]:
    return {"rope.dimension_count": width}


FULL = {"rope_type": "default", "rope_theta": 1e4}
HALF = {"rope_parameters": FULL | {"partial_rotary_factor": 0.5}}
NORMED = {"norm_topk_prob": True}
GPT2 = {
    "scale_attn_weights": True,
    "reorder_and_upcast_attn": False,
    "max_position_embeddings": 1024,
}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
TIED = {"tie_word_embeddings": True}
GEMMA = TIED | {"head_dim": 256, "query_pre_attn_scalar": 256}
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", PLAIN, rope(8), interleaved),
    "qwen2": Family("qwen2", PLAIN, pre="qwen2"),
    "qwen2moe": Family(
        "qwen2_moe",
        {
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "mlp_only_layers": [],
        },
        {},
        experts,
    ),
    "qwen3": Family("qwen3", {"head_dim": 128}),
    "qwen3moe": Family(
        "qwen3_moe", {"moe_intermediate_size": 768, "mlp_only_layers": []} | NORMED, {}, experts
    ),
    "phi3": Family("phi3", {"sliding_window": None, "rope_parameters": FULL}, rope(8)),
    "falcon": Family("falcon 2", {}, {"attention.head_count_kv": 1}, by_group),
    "bloom": Family("bloom 2", {"num_attention_heads": 4}, {"attention.head_count_kv": 4}, by_port),
    "stablelm": Family("stablelm 2", {"qk_layernorm": False}, rope(2)),
    "gpt2": Family("gpt2 2", GPT2, {}, transposed),
    "starcoder2": Family("starcoder2", {"sliding_window": None}),
    "nemotron": Family(
        "nemotron", {"attention_bias": False, "mlp_bias": False} | HALF, rope(4), shifted_all
    ),
    "gemma2": Family("gemma2", CAPS | GEMMA, {}, shifted),
    "gemma3": Family(
        "gemma3_text", GEMMA | {"layer_types": ["sliding_attention"] * 2}, {}, shifted
    ),
}


def stated(config: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
    """What the file of a config says, without the family in front."""
    there: dict[str, Any] = {}
    for key, names in KEYS.items():
        for name in names:
            if (value := getattr(config, name, None)) is not None:
                there.setdefault(key, value)
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = ropes.get("full_attention", ropes)
    if "rope_theta" in ropes:
        there["rope.freq_base"] = float(ropes["rope_theta"])
    return {key: value for key, value in (there | dict(keys)).items() if value is not None}


def write(
    path: Path,
    name: str,
    model: Any,
    family: Family,
    changed: Mapping[str, Any] = MappingProxyType({}),
    pre: str | None = None,
) -> None:
    """A file in float32, with a token for every byte."""
    (arch,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    config, writer = model.config, gguf.GGUFWriter(path, name)
    kinds: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32}
    kinds |= {float: writer.add_float32, str: writer.add_string}
    for key, value in stated(config, {**family.keys, **changed}).items():
        kinds[type(value)](f"{name}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or family.pre)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3])
    writer.add_token_scores([0.0] * 258)  # no merges: bytes alone
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for own, weight in model.state_dict().items():
        if own.endswith("lm_head.weight") and tied:
            continue
        for each, tensor in family.change(own, weight, config).items():
            target = names.get_name(each, try_suffixes=(".weight", ".bias"))
            if target is None:
                target = names.get_name(
                    each.removeprefix("transformer."), try_suffixes=(".weight", ".bias")
                )
            assert target is not None, each
            writer.add_tensor(target, tensor.contiguous().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
