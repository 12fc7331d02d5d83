"""Gemma 3: norms before and after attention and MLP, and on every head's queries and keys."""

from dataclasses import replace

from stages.model.architectures import qwen3
from stages.model.rules import Rule

_MLP_IN = Rule("pre_feedforward_layernorm:out", ("mlp.gate_proj", "mlp.up_proj"))
ARCHITECTURE = replace(qwen3.ARCHITECTURE, rules={**qwen3.ARCHITECTURE.rules, "mlp.in": _MLP_IN})
