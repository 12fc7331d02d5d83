"""The `spiking` method of transformers' quantizers: a saved model comes back with its neurons.

Weights stay what they are; what this adds to a checkpoint are the neurons' parameters, and to its
config the coding that reads them. Kept light: transformers imports it (see `stages.checkpoint.plugin`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from stages.checkpoint.plugin import METHOD
from stages.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(METHOD)
class SpikingConfig(QuantizationConfigMixin):
    """The `quantization_config` of a spiking model.

    `coding`, `transform`: dataclasses as plain values with the name of their class. `sites`: names in
    the order of the parameters. `parameters`: shape of each. `prefix`: ids kept in front of every text.
    `versions`: of what wrote it. Raises InputError on any other field.
    """

    def __init__(
        self,
        coding: dict[str, Any],
        sites: list[str],
        parameters: dict[str, list[int]],
        transform: dict[str, Any],
        prefix: list[int],
        versions: dict[str, str],
        **rest: Any,
    ) -> None:
        unknown = sorted(rest.keys() - {"quant_method"})
        if unknown:
            raise InputError(
                f"a quantization_config of method {METHOD!r} has the unknown field {unknown[0]!r}; "
                "load it with the version that wrote it"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.coding = coding
        self.sites = sites
        self.parameters = parameters
        self.transform = transform
        self.prefix = prefix
        self.versions = versions


@register_quantizer(METHOD)
class SpikingQuantizer(HfQuantizer):
    """Makes room for the neurons before the weights are read, and attaches them afterwards."""

    quantization_config: SpikingConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from stages.checkpoint.saved import make_room

        if model.get_output_embeddings() is None:
            raise InputError(
                f"a {type(model).__name__} has no head, and a spiking model is read with its head: use "
                "stages.load(folder) or AutoModelForCausalLM, and model.get_decoder() of it"
            )
        make_room(model, self.quantization_config, kwargs["checkpoint_files"])

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        from stages.checkpoint.saved import attach

        attach(model, self.quantization_config)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
