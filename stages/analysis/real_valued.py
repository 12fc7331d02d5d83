"""What a time-stepped run of a model computes on real values instead of spikes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.analysis.operations import Operation, operations
from stages.model.sites import find_sites
from stages.transforms.norms import has_scale

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REAL = {
    "norm": "normalisation",
    "rope": "rotary position embedding",
    "softmax": "softmax",
    "activation": "activation function",
    "residual": "residual and bias additions",
    "hadamard": "online rotation before down_proj",
    "mixing": "online rotation before down_proj",
}


def real_valued(model: PreTrainedModel) -> tuple[str, ...]:
    """List what a stepped run of the model computes on real values."""
    plan = operations(model, find_sites(model))
    names = dict(REAL)
    if any(has_scale(norm) for norm in _norms(model, plan)):
        names["norm"] += " and its scale (transform=fuse puts it into weights)"
    kinds = {operation.kind for operation in plan}
    listed = [names[kind] for kind in REAL if kind in kinds]
    if any(operation.name.endswith(":weighting") for operation in plan):
        listed.append("weights of the experts' outputs")
    if any(operation.name.endswith(":softcap") for operation in plan):
        listed.append("soft-cap of scores")
    if any(operation.name.endswith(":sink") for operation in plan):
        listed.append("shares of attention that sinks leave")
    return tuple(dict.fromkeys(listed))


def _norms(model: PreTrainedModel, plan: Sequence[Operation]) -> list[Any]:
    norms = [model.get_submodule(o.name) for o in plan if o.kind == "norm"]
    return [norm for norm in norms if getattr(norm, "weight", None) is not None]
