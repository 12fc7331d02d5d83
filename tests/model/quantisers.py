"""Checkpoints as quantisers lay them out: names, types and shapes of their tensors, and their configs.

Codes are real ones of the weights, rounded to the nearest; an expected number never comes from here but
where `dense` gives the weights that the codes stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
GROUP = 16  # weights that share a scale, along a row
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
NF4 = torch.tensor([-1, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0])
NF4 = torch.cat([NF4, torch.tensor([0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1])])


@dataclass(frozen=True)
class Quantiser:
    """`layout`: what a matrix [outputs, inputs] becomes, by the endings of names; `spec`: the config's
    `quantization_config`; `says`: what a refusal has to say of it."""

    layout: Callable[[Tensor], Tensors]
    spec: Mapping[str, Any]
    says: str
    beside: Mapping[str, Any] = field(default_factory=dict)  # a further json file: {name: content}

    def write(self, weights: Tensors) -> Tensors:
        """Every projection of the layers quantised, the rest as it is."""
        made: Tensors = {}
        for name, weight in weights.items():
            if not name.endswith("_proj.weight"):
                made[name] = weight
                continue
            path = name.removesuffix("weight")
            made |= {f"{path}{end}": part.contiguous() for end, part in self.layout(weight).items()}
        return made


def packed(codes: Tensor, bits: int, kind: torch.dtype) -> Tensor:
    """Join codes [..., inputs] below 2^bits, the first in the lowest bits of a number of `kind`."""
    each = torch.iinfo(kind).bits // bits
    parts = codes.long().unflatten(-1, (-1, each))
    whole = (parts << (bits * torch.arange(each))).sum(-1)
    return whole.to(torch.uint8 if kind == torch.uint8 else kind)


def rows(weight: Tensor, most: float, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes within ±most, and a scale for every row [outputs, 1]."""
    scale = weight.abs().amax(1, keepdim=True) / most
    codes = weight / scale
    return (codes if kind.is_floating_point else codes.round()).to(kind), scale


def groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0 … 15 about 8, and a scale for every GROUP of a row [outputs, groups]."""
    parts = weight.unflatten(1, (-1, GROUP))
    scale = parts.abs().amax(2, keepdim=True) / 7
    return ((parts / scale).round() + 8).flatten(1), scale[..., 0]


def int8(weight: Tensor) -> Tensors:
    codes, scale = rows(weight, 127, torch.int8)
    return {"weight": codes, "weight_scale": scale.bfloat16()}


def float8(weight: Tensor) -> Tensors:
    codes, scale = rows(weight, 448, torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}


def pack_quantized(weight: Tensor) -> Tensors:
    codes, scale = groups(weight)
    shape = torch.tensor(weight.shape)
    return {
        "weight_packed": packed(codes, 4, torch.int32),
        "weight_scale": scale.bfloat16(),
        "weight_shape": shape,
    }


def nvfp4(weight: Tensor) -> Tensors:
    parts = weight.unflatten(1, (-1, 16))
    scale = parts.abs().amax(2) / 6
    whole = scale.max() / 448
    small = (scale / whole).to(torch.float8_e4m3fn)
    codes = four_bits(parts / (small.float() * whole)[..., None]).flatten(1)
    return {
        "weight_packed": packed(codes, 4, torch.uint8),
        "weight_scale": small,
        "weight_global_scale": (1 / whole).reshape(1),
    }


def four_bits(numbers: Tensor) -> Tensor:
    """The nearest codes of E2M1: three bits of magnitude below the sign."""
    nearest = (numbers.abs()[..., None] - FP4).abs().argmin(-1)
    return nearest + 8 * (numbers < 0)


def gptq(weight: Tensor) -> Tensors:
    codes, scale = groups(weight)
    zeros = torch.full_like(scale, 7)  # stored less one
    return {
        "qweight": packed(codes, 4, torch.int32).T,  # [inputs / 8, outputs]
        "qzeros": packed(zeros.T.contiguous(), 4, torch.int32),
        "scales": scale.T.half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def awq(weight: Tensor) -> Tensors:
    codes, scale = groups(weight)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    mixed = codes.T.unflatten(1, (-1, 8))[..., order].flatten(1)
    zeros = torch.full_like(scale.T, 8)
    return {
        "qweight": packed(mixed, 4, torch.int32),  # [inputs, outputs / 8]
        "qzeros": packed(zeros.contiguous(), 4, torch.int32),
        "scales": scale.T.half(),
    }


def bnb_8bit(weight: Tensor) -> Tensors:
    codes, scale = rows(weight, 127, torch.int8)
    form = torch.tensor(0, dtype=torch.uint8)
    return {"weight": codes, "SCB": scale[:, 0] * 127, "weight_format": form}


def bnb_4bit(weight: Tensor) -> Tensors:
    blocks = weight.reshape(-1, 64)
    most = blocks.abs().amax(1)
    codes = ((blocks / most[:, None])[..., None] - NF4).abs().argmin(-1)
    state = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [%d, %d]}'
    return {
        "weight": packed(codes.reshape(-1, 2).flip(1).flatten(), 4, torch.uint8)[:, None],
        "weight.absmax": most,
        "weight.quant_map": NF4.clone(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(state % tuple(weight.shape)), dtype=torch.uint8
        ),
    }


def torchao(weight: Tensor) -> Tensors:
    codes, scale = rows(weight, 127, torch.int8)
    return {"_weight_qdata": codes, "_weight_scale": scale}


def hqq(weight: Tensor) -> Tensors:
    codes, scale = groups(weight)
    flat = codes.reshape(-1, GROUP)
    half = len(flat) // 2
    return {
        "W_q": (flat[:half].to(torch.uint8) << 4) | flat[half:].to(torch.uint8),
        "scale": scale.reshape(-1, 1),
        "zero": torch.full((scale.numel(), 1), 8.0),
        "shape": torch.tensor(weight.shape),
        "nbits": torch.tensor(4),
        "group_size": torch.tensor(GROUP),
    }


def quanto(weight: Tensor) -> Tensors:
    codes, scale = rows(weight, 127, torch.int8)
    fixed = {"input_scale": torch.ones(()), "output_scale": torch.ones(())}
    return {"weight._data": codes, "weight._scale": scale} | fixed


def modelopt_fp8(weight: Tensor) -> Tensors:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(())}


def fbgemm(weight: Tensor) -> Tensors:
    return float8(weight) | {"input_scale_ub": torch.tensor([1200.0])}


def bitnet(weight: Tensor) -> Tensors:
    scale = weight.abs().mean()
    codes = (weight / scale).round().clamp(-1, 1) + 1
    quarters = codes.unflatten(0, (4, -1)).permute(1, 2, 0).contiguous()  # [outputs / 4, inputs, 4]
    return {"weight": packed(quarters, 2, torch.uint8)[..., 0], "weight_scale": scale.reshape(1)}


def eetq(weight: Tensor) -> Tensors:
    codes, scale = rows(weight, 127, torch.int8)
    return {"weight": codes.T, "weight_scales": scale[:, 0].half()}


def mlx(weight: Tensor) -> Tensors:
    codes, scale = groups(weight)
    whole = packed(codes, 4, torch.int32).view(torch.uint32)
    return {"weight": whole, "scales": scale.bfloat16(), "biases": (-8 * scale).bfloat16()}


def _compressed(form: str, bits: int, kind: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_COMPRESSED = "is quantised by compressed-tensors, .* reads it with compressed-tensors"
_MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
REFUSED: dict[str, Quantiser] = {
    "compressed-tensors int-quantized": Quantiser(
        int8, _compressed("int-quantized", 8, "int"), _COMPRESSED
    ),
    "compressed-tensors pack-quantized": Quantiser(
        pack_quantized, _compressed("pack-quantized", 4, "int"), _COMPRESSED
    ),
    "compressed-tensors float-quantized": Quantiser(
        float8, _compressed("float-quantized", 8, "float"), _COMPRESSED
    ),
    "compressed-tensors nvfp4-pack-quantized": Quantiser(
        nvfp4, _compressed("nvfp4-pack-quantized", 4, "float"), _COMPRESSED
    ),
    "gptq": Quantiser(
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
        "is quantised by gptq, .* reads it with gptqmodel and optimum",
    ),
    "awq": Quantiser(
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        "is quantised by awq, .* reads it with gptqmodel",
    ),
    "bitsandbytes 8 bits": Quantiser(
        bnb_8bit,
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "is quantised by bitsandbytes, .* reads it with bitsandbytes",
    ),
    "bitsandbytes 4 bits": Quantiser(
        bnb_4bit,
        {"quant_method": "bitsandbytes"} | _NF4,
        "is quantised by bitsandbytes, .* reads it with bitsandbytes",
    ),
    "torchao": Quantiser(
        torchao,
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
        "is quantised by torchao, .* reads it with torchao",
    ),
    "hqq": Quantiser(
        hqq,
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
        "is quantised by hqq, .* reads it with hqq",
    ),
    "quanto": Quantiser(
        quanto,
        {"quant_method": "quanto", "weights": "int8"},
        "is quantised by quanto, .* reads it with optimum-quanto",
    ),
    "modelopt": Quantiser(
        modelopt_fp8,
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        "is quantised by 'modelopt', which transformers does not read",
    ),
    "hf_quant_config.json": Quantiser(
        modelopt_fp8,
        {},
        r"is quantised by ModelOpt \(its hf_quant_config.json\)",
        {"hf_quant_config.json": _MODELOPT},
    ),
    "fbgemm_fp8": Quantiser(
        fbgemm,
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        "is quantised by fbgemm_fp8, .* reads it with fbgemm-gpu",
    ),
    "bitnet": Quantiser(bitnet, {"quant_method": "bitnet"}, "is quantised by bitnet"),
    "eetq": Quantiser(
        eetq, {"quant_method": "eetq", "weights": "int8"}, "is quantised by eetq, .* with kernels"
    ),
    "mlx": Quantiser(
        mlx, {"group_size": GROUP, "bits": 4}, "is quantised by 'a method without a name'"
    ),
}
