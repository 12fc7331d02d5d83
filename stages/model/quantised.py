"""Checkpoints with quantised weights: FP8 and MXFP4 are dequantised, all others refused by their names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError
from stages.model.files import NUMBERS, Stored, unreported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPIKING = "spiking"  # as `quantization_config.quant_method` in the config.json of an export
# What transformers multiplies out. FP8 has one scale a block of weights, or one a matrix, as numbers or
# (mxfp8) as powers of two; MXFP4, of gpt-oss' experts, a power of two for 32 codes of 4 bits.
FP8, MXFP4 = ("fp8", "mxfp8"), "mxfp4"
_SCALE = "_scale_inv"
_POWERS = ("F8_E8M0", "U8")  # a scale's exponent, 127 for 1
_PACKAGES = {  # what transformers needs beside itself, for methods that a user is likely to meet
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "fbgemm_fp8": "fbgemm-gpu",
    "gptq": "gptqmodel and optimum",
    "hqq": "hqq",
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


def check_method(
    config: Any, folder: Path, tensors: Mapping[str, Stored], source: str
) -> frozenset[str]:
    """Return the tensors that the config's method reads, codes and their scales.

    Raises InputError for a method that is not dequantised, for codes without a scale that fits, and for
    a method in the config of files that hold no codes.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    name = method(config)
    if (folder / "hf_quant_config.json").is_file():
        raise InputError(
            f"model {source} is quantised by ModelOpt (its hf_quant_config.json), whose scales "
            f"transformers does not read; {_INSTEAD}"
        )
    if name is None:
        return frozenset()
    if all(tensor.dtype in NUMBERS for tensor in tensors.values()):
        raise InputError(
            f"model {source}: its config.json says that it is quantised by {name}, and its files hold "
            "no codes; if they are the weights themselves, take quantization_config out of config.json"
        )
    if name in FP8:
        return _eight_bit(_spec(config), tensors, source)
    if name == MXFP4:
        return _four_bit(tensors, source)
    if name not in {key.partition("_4bit")[0] for key in AUTO_QUANTIZER_MAPPING}:
        raise InputError(
            f"model {source} is quantised by {name!r}, which transformers does not read; {_INSTEAD}"
        )
    package = f" (transformers reads it with {_PACKAGES[name]})" if name in _PACKAGES else ""
    raise InputError(
        f"model {source} is quantised by {name}, which a conversion does not take{package}; {_INSTEAD}"
    )


def _eight_bit(
    spec: Mapping[str, Any], tensors: Mapping[str, Stored], source: str
) -> frozenset[str]:
    """Codes [rows, columns] in E4M3, each with a scale for every block that the config gives."""
    block = spec.get("weight_block_size", (128, 128)) or ()  # null: one for a matrix
    codes = {name for name, tensor in tensors.items() if tensor.dtype.startswith("F8_E4M3")}
    for name in sorted(codes):
        scale = _scale(tensors, name, f"{name}{_SCALE}", (*NUMBERS, *_POWERS), source)
        blocks = tuple(n * size for n, size in zip(scale.shape, block, strict=False))
        # transformers would cut the matrix into equal parts, also where the last block is a smaller one
        if math.prod(scale.shape) > 1 and blocks != tensors[name].shape:
            raise InputError(
                f"model {source}: {name} {list(tensors[name].shape)} is no whole number of blocks "
                f"{list(block)}, {list(scale.shape)} of them by {name}{_SCALE}; {_INSTEAD}"
            )
    return frozenset(codes | {f"{name}{_SCALE}" for name in codes})


def _four_bit(tensors: Mapping[str, Stored], source: str) -> frozenset[str]:
    """Blocks [experts, rows, blocks, 16], two codes a byte, each with a scale [experts, rows, blocks]."""
    blocks = {n for n, tensor in tensors.items() if n.endswith("_blocks") and tensor.dtype == "U8"}
    scales = {name: f"{name.removesuffix('_blocks')}_scales" for name in blocks}
    for name in sorted(blocks):
        scale = _scale(tensors, name, scales[name], ("U8",), source)
        if tensors[name].shape != (*scale.shape, 16):
            raise InputError(
                f"model {source}: {name} {list(tensors[name].shape)} is no whole number of blocks of 16 "
                f"bytes, {list(scale.shape)} of them by {scales[name]}; {_INSTEAD}"
            )
    return frozenset({*scales, *scales.values()})


def _scale(
    tensors: Mapping[str, Stored], name: str, wanted: str, kinds: Sequence[str], source: str
) -> Stored:
    """The scales of the codes `name`."""
    scale = tensors.get(wanted)
    if scale is None:
        raise InputError(
            f"model {source}: {name} is {tensors[name].dtype}, and its files lack {wanted}"
        )
    if scale.dtype not in kinds:
        raise InputError(
            f"model {source}: {wanted} is {scale.dtype}, and scales are {', '.join(kinds)}; {_INSTEAD}"
        )
    return scale


def dequantise(config: Any) -> None:
    """Let transformers multiply the scales out, on every device.

    Without it a device that computes in FP8 would round the activations to FP8 too, and one that
    computes in MXFP4 would keep the codes.
    """
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) == {}:  # nothing is, and no method reads that
            del part.quantization_config
        if method(config) in (*FP8, MXFP4) and getattr(part, "quantization_config", None):
            part.quantization_config["dequantize"] = True


def quantiser(model: PreTrainedModel) -> Any:
    """Return what transformers dequantises a `skeleton` with, None where there are no scales."""
    from transformers.quantizers.auto import AutoHfQuantizer

    if method(model.config) is None:
        return None
    made = AutoHfQuantizer.from_config(_spec(model.config), pre_quantized=True)
    with unreported():
        made.preprocess_model(model)
    made.remove_quantization_config(model)
    return made


def check_plain(model: PreTrainedModel, source: str) -> None:
    """Raise InputError if a weight is still quantised, as an embedding in FP8 is."""
    small = [name for name, weight in model.named_parameters() if weight.dtype.itemsize < 2]
    if small:
        raise InputError(f"model {source}: {small[0]} stays quantised; {_INSTEAD}")
