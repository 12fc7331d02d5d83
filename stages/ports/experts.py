"""Mixtures of experts whose operands pass through ports, one port an expert and role.

transformers keeps the experts of a layer as fused weights, gate_up_proj [E, 2 I, H] and down_proj
[E, H, I] or their transposes, so that no linear module could be hooked; so this function replaces that
of the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from stages.model.experts import expert_biases, expert_matrices, operands
from stages.ports.attention import Port
from stages.ports.visibility import ForwardState

NAME = "ported"
_PORTS = "expert_ports"


@dataclass(frozen=True)
class ExpertPorts:
    """The ports of one layer's experts, by expert, and the state of the pass."""

    act: Sequence[Port]
    up: Sequence[Port]
    down: Sequence[Port]
    state: ForwardState


def set_expert_ports(module: nn.Module, ports: ExpertPorts | None) -> None:
    """Bind ports to a module of experts, or take them off."""
    if ports is None:
        module.__dict__.pop(_PORTS, None)
    else:
        module.__dict__[_PORTS] = ports


def ported_experts(
    module: Any,
    hidden: Tensor,  # [N, H], coded already
    top_k_index: Tensor,  # [N, k]
    top_k_weights: Tensor,  # [N, k]
    inputs_weighted: bool = False,
) -> Tensor:
    """Run every expert on the tokens that are routed to it, weighted and summed, [N, H].

    Where inputs are weighted instead of outputs, it is their product that is: the same number.
    """
    ports: ExpertPorts = module.__dict__[_PORTS]
    expert, order = top_k_index.flatten().sort(stable=True)
    token = order // top_k_index.shape[1]
    weight = top_k_weights.flatten()[order, None]
    tokens = ports.state.real_at(hidden)
    real = None if tokens is None else tokens.flatten()[token]
    output = torch.zeros_like(hidden)
    ends = torch.bincount(expert, minlength=module.num_experts).cumsum(0).tolist()
    gate_up_proj, down_proj = expert_matrices(module)
    added, last = expert_biases(module)
    width = down_proj.shape[1]
    for index, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
        if start == stop:
            continue
        mine = slice(start, stop)
        rows = None if real is None else real[mine]
        gate_up = F.linear(hidden[token[mine]], gate_up_proj[index], added[index])
        act, up = operands(module, gate_up * weight[mine] if inputs_weighted else gate_up)
        inner = ports.act[index](act, rows, 0) * ports.up[index](up.contiguous(), rows, 0)
        value = F.linear(ports.down[index](inner, rows, width), down_proj[index], last[index])
        value = value if inputs_weighted else value * weight[mine]
        output.index_add_(0, token[mine], value.to(output.dtype))
    return output


ALL_EXPERTS_FUNCTIONS.register(NAME, ported_experts)


def switch_experts(model: PreTrainedModel, name: str) -> str:
    """Make `name` the function of all experts; return the name of the one before."""
    before: str = model.config._experts_implementation
    model.set_experts_implementation(name)
    model.config._experts_implementation_internal = name  # also where transformers has no choice
    return before
