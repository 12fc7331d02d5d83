"""Mixtures of experts: the operands that each expert has, and the layout of the weights that is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.errors import InputError

EXPERT_PORTS = ("act", "up", "down")


def refuse_experts(sites: Sequence[Any], what: str, instead: str) -> None:
    """Raise InputError where a site belongs to an expert, whose rows are tokens of any window."""
    if any(site.expert is not None for site in sites):
        raise InputError(f"{what} is not defined on experts, which see few tokens each: {instead}")


def check_experts(name: str, module: Any) -> None:
    """Raise InputError on experts of another layout than two concatenated, unbiased weights."""
    odd = [
        flag
        for flag, usual in (
            ("is_transposed", False),
            ("has_bias", False),
            ("has_gate", True),
            ("is_concatenated", True),
            ("has_post_expert_norm", False),
        )
        if getattr(module, flag, None) is not usual
    ]
    if odd:
        raise InputError(
            f"experts {name} of {type(module).__name__} have another layout ({', '.join(odd)}) than "
            "gate_up_proj [E, 2 I, H] and down_proj [E, H, I] without biases, which is what is ported"
        )
