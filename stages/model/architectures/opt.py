"""OPT: LayerNorm in front of attention and MLP or behind them, no gate, positions that are learned.

The operand is what the projections are given, not the norm's output: where the norm stands behind,
that output is the residual stream as well.
"""

from stages.model.architectures.llama import ATTENTION, HEAD
from stages.model.rules import Architecture, Rule

_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ARCHITECTURE = Architecture(
    layers="model.decoder.layers",
    rules=ATTENTION
    | {
        "attn.in": Rule("self_attn.q_proj:in", _PROJECTIONS),
        "attn.out": Rule("self_attn.out_proj:in", ("self_attn.out_proj",)),
        "mlp.in": Rule("fc1:in", ("fc1",)),
        "mlp.down": Rule("fc2:in", ("fc2",)),
    },
    head=HEAD,
    outside=tuple(
        Rule(f"model.decoder.{name}:in", (f"model.decoder.{name}",))
        for name in ("project_in", "project_out")
    ),
    activation="activation_fn",
)
