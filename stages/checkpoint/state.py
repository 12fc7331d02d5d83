"""State dicts of a spiking model: weights with neurons, for a model with neurons of the same kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.checkpoint.config import SpikingConfig
from stages.checkpoint.format import NEURONS
from stages.errors import InputError
from stages.model.prefix import prefix_length


def state_hooks(model: PreTrainedModel) -> tuple[Any, Any]:
    """Let a model's state dicts say of which neurons they are, and refuse those of others before a
    weight is read: the handles of both hooks.

    PyTorch keeps what is said beside the tensors (`_metadata`), also through `torch.save`.
    """
    kind = _kind(model.config.quantization_config)

    def written(module: Any, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
        metadata[NEURONS] = kind

    def read(
        module: Any, state: Mapping[str, Tensor], prefix: str, metadata: Any, *rest: Any
    ) -> None:
        if metadata.get(NEURONS, kind) != kind:
            raise InputError(
                "this state dict has neurons of another coding, at other sites or behind another "
                "transform than this model: load it into one that was converted in the same way"
            )
        if prefix_length(module) and _other_weights(module, state, prefix):
            raise InputError(
                "the prefix of this model was computed with its weights, and a state dict has others: "
                "load them into the dense model, before its transform"
            )

    return (
        model.register_state_dict_post_hook(written),
        model.register_load_state_dict_pre_hook(read),
    )


def _kind(spec: SpikingConfig) -> str:
    """A digest of what neurons are beside their parameters."""
    parts = [spec.coding, list(spec.sites), spec.transform, list(spec.prefix)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _other_weights(model: PreTrainedModel, state: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether a state dict has a weight that is not the model's; those on disk are not compared."""
    pairs = [(own, state.get(prefix + name)) for name, own in model.named_parameters()]
    return any(
        given is not None and not (given.shape == own.shape and torch.equal(given.to(own), own))
        for own, given in pairs
        if not own.is_meta
    )
