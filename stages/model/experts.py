"""Mixtures of experts: the operands that each expert has, and the layout of the weights that is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.errors import InputError

EXPERT_PORTS = ("act", "up", "down")
# The layout of experts that transformers says nothing of.
_LAYOUTS = {
    "Llama4TextExperts": {
        "has_gate": True,
        "has_bias": False,
        "has_post_expert_norm": False,
        "is_transposed": True,
        "is_concatenated": True,
    }
}
_USUAL_GATE = "_default_apply_gate"  # of transformers.integrations.moe


def refuse_experts(sites: Sequence[Any], what: str, instead: str) -> None:
    """Raise InputError where a site belongs to an expert, whose rows are tokens of any window."""
    if any(site.expert is not None for site in sites):
        raise InputError(f"{what} is not defined on experts, which see few tokens each: {instead}")


def check_experts(name: str, module: Any) -> None:
    """Raise InputError on experts of another layout than two fused weights with a gate, or with a gate
    that is not known."""
    odd = [
        name
        for name, usual in (("has_gate", True), ("has_post_expert_norm", False))
        if flag(module, name) is not usual
    ]
    gate = getattr(type(module), "_apply_gate", None)
    if type(module).__name__ in _LAYOUTS:
        return
    if gate is None or (gate.__name__ != _USUAL_GATE and type(module).__name__ not in GATES):
        odd.append("a gate of its own")
    if odd:
        raise InputError(
            f"experts {name} of {type(module).__name__} have another layout ({', '.join(odd)}) than "
            "gate_up_proj [E, 2 I, H] and down_proj [E, H, I], transposed or not, with "
            "act_fn(gate) * up between them, which is what is ported"
        )


def flag(module: Any, name: str) -> Any:
    """Return what transformers says of the layout of experts, None where it says nothing."""
    return getattr(module, name, _LAYOUTS.get(type(module).__name__, {}).get(name))


def expert_matrices(module: Any) -> tuple[Tensor, Tensor]:
    """Return the weights of gate and up [E, 2 I, H] and of down [E, H, I], views where they are kept
    as [E, H, 2 I] and [E, I, H]."""
    gate_up, down = module.gate_up_proj, module.down_proj
    return (gate_up.mT, down.mT) if flag(module, "is_transposed") else (gate_up, down)


def expert_biases(module: Any) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Return the biases of gate and up and of down, by expert."""
    if flag(module, "has_bias"):
        return module.gate_up_proj_bias, module.down_proj_bias
    none = [None] * int(module.num_experts)
    return none, none


def operands(module: Any, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two factors of the gated product, act and up [..., I], of gate_up [..., 2 I]."""
    if flag(module, "is_concatenated"):
        gate, up = gate_up.chunk(2, -1)
    else:  # gate and up in turn
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    apart = GATES.get(type(module).__name__)
    return (module.act_fn(gate), up) if apart is None else apart(module, gate, up)


def _gpt_oss(module: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """SwiGLU clamped, with a slope, and one added to what is not gated."""
    gate = gate.clamp(max=module.limit)
    act = gate * torch.sigmoid(gate * module.alpha)
    return act, up.clamp(-module.limit, module.limit) + 1


# Gates that are not act_fn(gate) * up, by the class of the experts.
GATES: dict[str, Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "GptOssExperts": _gpt_oss
}
