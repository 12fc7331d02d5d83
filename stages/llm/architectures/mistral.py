"""Mistral: Llama's modules."""

from stages.llm.architectures.llama import ARCHITECTURE

__all__ = ["ARCHITECTURE"]
