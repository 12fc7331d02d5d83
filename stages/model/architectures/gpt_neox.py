"""GPT-NeoX: LayerNorm, attention and MLP side by side or in turn, one projection for q, k and v."""

from stages.model.architectures.llama import HEAD
from stages.model.rules import Architecture, Rule

ARCHITECTURE = Architecture(
    layers="gpt_neox.layers",
    rules={
        "attn.in": Rule("input_layernorm:out", ("attention.query_key_value",)),
        "attn.q": Rule("attention:q"),
        "attn.k": Rule("attention:k"),
        "attn.v": Rule("attention:v"),
        "attn.probs": Rule("attention:probs"),
        "attn.out": Rule("attention.dense:in", ("attention.dense",)),
        "mlp.in": Rule("post_attention_layernorm:out", ("mlp.dense_h_to_4h",)),
        "mlp.down": Rule("mlp.dense_4h_to_h:in", ("mlp.dense_4h_to_h",)),
    },
    head=HEAD,
    activation="mlp.act",
)
