"""Layers that carry a state from token to token, which have no product of queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a class of transformers is, by a part of its name; the first that fits.
_KINDS = {
    "rwkv": "a linear attention (RWKV)",
    "deltanet": "a linear attention (gated delta rule)",
    "deltaattention": "a linear attention (delta rule)",
    "lightningattention": "a linear attention (lightning)",
    "linearattention": "a linear attention",
    "mlstm": "a recurrent layer (mLSTM)",
    "rglru": "a recurrent layer (RG-LRU)",
    "shortconv": "a gated convolution over tokens",
    "mamba": "a state-space layer",
}
_AROUND = (
    "block",
    "layer",
    "model",
    "norm",
)  # ends of names of what holds such a layer, or is in it


def refuse_recurrence(model: PreTrainedModel) -> None:
    """Raise InputError where a layer carries a state from token to token."""
    for name, module in model.named_modules():
        what = _kind(type(module).__name__) if module is not model else None
        if what is None and "A_log" in module._parameters:  # the decay of a state-space model
            what = "a state-space layer"
        if what is not None:
            raise InputError(
                f"model_type={model.config.model_type!r} cannot be converted: {name} is {what} "
                f"({type(module).__name__}), whose state goes from token to token and is multiplied "
                "anew at each, which no neuron here codes; give a model whose layers are all attention"
            )


def _kind(name: str) -> str | None:
    name = name.lower()
    if name.endswith(_AROUND):
        return None
    return next((kind for part, kind in _KINDS.items() if part in name), None)
