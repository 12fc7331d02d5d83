"""Qwen3-MoE: Qwen3's attention, experts in place of the MLP in all layers or in some."""

from dataclasses import replace

from stages.model.architectures import mixtral, qwen3

ARCHITECTURE = replace(qwen3.ARCHITECTURE, experts=mixtral.EXPERTS)
