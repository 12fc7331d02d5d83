"""The `quantization_config` of a spiking model; light, as transformers imports it with its methods."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from stages.errors import InputError
from stages.model.quantised import SPIKING


@register_quantization_config(SPIKING)
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
                f"a quantization_config of method {SPIKING!r} has the unknown field {unknown[0]!r}; "
                "load it with the version that wrote it"
            )
        self.quant_method = SPIKING  # type: ignore[assignment]
        self.coding = coding
        self.sites = sites
        self.parameters = parameters
        self.transform = transform
        self.prefix = prefix
        self.versions = versions
