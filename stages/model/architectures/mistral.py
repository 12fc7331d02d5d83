"""Mistral: Llama's modules."""

from stages.model.architectures.llama import ARCHITECTURE

__all__ = ["ARCHITECTURE"]
