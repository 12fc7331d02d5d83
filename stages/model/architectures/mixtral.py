"""Mixtral: Llama's attention, experts in place of the MLP."""

from dataclasses import replace

from stages.model.architectures import llama
from stages.model.rules import Rule

EXPERTS = {
    "mlp.in": Rule("post_attention_layernorm:out", ("mlp.gate", "mlp.experts")),
    "mlp.act": Rule("mlp.experts:act"),
    "mlp.up": Rule("mlp.experts:up"),
    "mlp.down": Rule("mlp.experts:down", ("mlp.experts",)),
}
ARCHITECTURE = replace(llama.ARCHITECTURE, experts=EXPERTS)
