"""Phi-3: queries, keys and values in one projection, gate and up in another."""

from stages.model.architectures.llama import ATTENTION, HEAD
from stages.model.rules import Architecture, Rule

ARCHITECTURE = Architecture(
    layers="model.layers",
    rules=ATTENTION
    | {
        "attn.in": Rule("input_layernorm:out", ("self_attn.qkv_proj",)),
        "mlp.in": Rule("post_attention_layernorm:out", ("mlp.gate_up_proj",)),
        "mlp.act": Rule("mlp.activation_fn:out"),
        "mlp.up": Rule("mlp.gate_up_proj:out[1/2]"),
        "mlp.down": Rule("mlp.down_proj:in", ("mlp.down_proj",)),
    },
    head=HEAD,
    activation="mlp.activation_fn",
)
