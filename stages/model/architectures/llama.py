"""Llama."""

from stages.model.rules import Architecture, Rule

ATTENTION = {
    "attn.in": Rule(
        "input_layernorm:out", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ),
    "attn.q": Rule("self_attn:q"),
    "attn.k": Rule("self_attn:k"),
    "attn.v": Rule("self_attn:v"),
    "attn.probs": Rule("self_attn:probs"),
    "attn.out": Rule("self_attn.o_proj:in", ("self_attn.o_proj",)),
}
MLP = {
    "mlp.in": Rule("post_attention_layernorm:out", ("mlp.gate_proj", "mlp.up_proj")),
    "mlp.act": Rule("mlp.act_fn:out"),
    "mlp.up": Rule("mlp.up_proj:out"),
    "mlp.down": Rule("mlp.down_proj:in", ("mlp.down_proj",)),
}
HEAD = Rule("lm_head:in", ("lm_head",))
ARCHITECTURE = Architecture("model.layers", ATTENTION | MLP, HEAD, "mlp.act_fn")
