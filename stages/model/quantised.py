"""Checkpoints with quantised weights: one method is dequantised, every other is refused by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError
from stages.model.files import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPIKING = "spiking"  # as `quantization_config.quant_method` in the config.json of an export
FP8 = "fp8"  # one scale a block of weights, or one a matrix; transformers multiplies them out
_SCALE = "_scale_inv"
_PACKAGES = {  # what transformers needs beside itself, for methods that a user is likely to meet
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "gptq": "gptqmodel and optimum",
    "hqq": "hqq",
    "mxfp4": "kernels",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "torchao": "torchao",
    "vptq": "vptq",
}
_INSTEAD = "dequantise it, write it by save_pretrained and give that folder as model.path=FOLDER"


def method(config: Any) -> str | None:
    """Return the method of a config's `quantization_config`, None for a checkpoint that has none."""
    spec = _spec(config)
    if not spec:
        return None
    if spec.get("load_in_4bit") or spec.get("load_in_8bit"):
        return "bitsandbytes"  # older folders name nothing else
    return str(spec.get("quant_method", "a method without a name"))


def _spec(config: Any) -> dict[str, Any]:
    for part in (config, config.get_text_config(decoder=True)):
        if spec := getattr(part, "quantization_config", None):
            return spec if isinstance(spec, dict) else dict(spec.to_dict())
    return {}


def check_method(config: Any, folder: Path, source: str) -> None:
    """Raise InputError unless weights are stored as they are, or by the method that is dequantised."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    name = method(config)
    if (folder / "hf_quant_config.json").is_file():
        raise InputError(
            f"model {source} is quantised by ModelOpt (its hf_quant_config.json), whose scales "
            f"transformers does not read; {_INSTEAD}"
        )
    if name in (None, FP8):
        return
    if name not in {key.partition("_4bit")[0] for key in AUTO_QUANTIZER_MAPPING}:
        raise InputError(
            f"model {source} is quantised by {name!r}, which transformers does not read; {_INSTEAD}"
        )
    package = f" (transformers reads it with {_PACKAGES[name]})" if name in _PACKAGES else ""
    raise InputError(
        f"model {source} is quantised by {name}, which a conversion does not take{package}; {_INSTEAD}"
    )


def scaled(config: Any, tensors: Mapping[str, Stored], source: str) -> frozenset[str]:
    """Return the tensors that the config's method reads; InputError where one has no scale that fits."""
    if method(config) != FP8:
        return frozenset()
    block = _spec(config).get("weight_block_size", (128, 128)) or ()  # null: one for a matrix
    codes = {name for name, tensor in tensors.items() if tensor.dtype.startswith("F8_E4M3")}
    for name in sorted(codes):
        scale = tensors.get(f"{name}{_SCALE}")
        if scale is None:
            raise InputError(
                f"model {source}: {name} is {tensors[name].dtype}, and its files lack {name}{_SCALE}"
            )
        blocks = tuple(n * size for n, size in zip(scale.shape, block, strict=False))
        # transformers would cut the matrix into equal parts, also where the last block is a smaller one
        if math.prod(scale.shape) > 1 and blocks != tensors[name].shape:
            raise InputError(
                f"model {source}: {name} {list(tensors[name].shape)} is no whole number of blocks "
                f"{list(block)}, {list(scale.shape)} of them by {name}{_SCALE}; {_INSTEAD}"
            )
    return frozenset(codes)


def dequantise(config: Any) -> None:
    """Let transformers multiply the scales out, on every device.

    Without it a device that computes in FP8 would round the activations to FP8 too.
    """
    for part in (config, config.get_text_config(decoder=True)):
        if method(config) == FP8 and getattr(part, "quantization_config", None):
            part.quantization_config["dequantize"] = True


def quantiser(model: PreTrainedModel) -> Any:
    """Return what transformers dequantises a `skeleton` with, None where there are no scales."""
    from transformers.quantizers.auto import AutoHfQuantizer

    if method(model.config) is None:
        return None
    made = AutoHfQuantizer.from_config(_spec(model.config), pre_quantized=True)
    made.preprocess_model(model)
    made.remove_quantization_config(model)
    return made


def check_plain(model: PreTrainedModel, source: str) -> None:
    """Raise InputError if a weight is still quantised, as an embedding in FP8 is."""
    small = [name for name, weight in model.named_parameters() if weight.dtype.itemsize < 2]
    if small:
        raise InputError(f"model {source}: {small[0]} stays quantised; {_INSTEAD}")
