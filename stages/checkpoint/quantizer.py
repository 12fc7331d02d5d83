"""The `spiking` method of transformers' quantizers: a saved model comes back with its neurons.

Weights stay what they are; what this adds to a checkpoint are the neurons' parameters, and to its
config the coding that reads them. Kept light: transformers imports it (see `stages.checkpoint.plugin`),
so what binds neurons is imported when a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from stages.checkpoint.config import SpikingConfig
from stages.errors import InputError
from stages.model.quantised import SPIKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantizer(SPIKING)
class SpikingQuantizer(HfQuantizer):
    """Makes room for the neurons before the weights are read, and attaches them afterwards."""

    quantization_config: SpikingConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from stages.checkpoint.binding import make_room

        if model.get_output_embeddings() is None:
            raise InputError(
                f"a {type(model).__name__} has no head, and a spiking model is read with its head: use "
                "stages.load(folder) or AutoModelForCausalLM, and model.get_decoder() of it"
            )
        make_room(model, self.quantization_config, kwargs["checkpoint_files"])

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        from stages.checkpoint.binding import attach

        attach(model, self.quantization_config)
        return model

    def update_device_map(self, device_map: Any) -> Any:
        """Place the neurons by a map of the dense model's modules: ports move them where they work."""
        from stages.checkpoint.format import NEURONS

        if not isinstance(device_map, dict) or {"", NEURONS} & set(device_map):
            return device_map
        return device_map | {NEURONS: "cpu"}

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> NoReturn:
        raise InputError(
            "stages.restore(model) takes the neurons off a spiking model, not dequantize"
        )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True for transformers' Trainer, which evaluates no other model; its gradients are refused."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True
