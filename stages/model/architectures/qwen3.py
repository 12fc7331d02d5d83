"""Qwen3: Llama's modules, and a norm on every head's queries and keys."""

from dataclasses import replace

from stages.model.architectures import llama

HEAD_NORMS = {"self_attn.q_norm": "attn.q", "self_attn.k_norm": "attn.k"}
ARCHITECTURE = replace(llama.ARCHITECTURE, head_norms=HEAD_NORMS)
