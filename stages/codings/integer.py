"""Activations as integers of b bits, multiplied as such: the honest neighbour of a spiking code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Coding
from stages.errors import InputError
from stages.fits.range_search import even_levels
from stages.fitted import Fit
from stages.neurons.decoding import Decoding
from stages.neurons.spikes import Params
from stages.registry import register

BITS = (2, 16)  # fewest and most of an activation and of a weight
PER = ("tensor", "token")
SCALES = ("maximum", "least_error")
SUMMED = "attn.v"  # the operand whose product sums over tokens


@register("coding/integer")
@dataclass(frozen=True)
class Integer(Coding):
    """x as the integer round(x / Δ) within ±(2^(b-1) - 1), with Δ = scale / (2^(b-1) - 1): the symmetric
    uniform quantiser, without a zero point.

    No spiking model: it has no spikes, and its products are multiplications of integers of `bits` and
    `weight_bits`. The latter is what a product costs alone: weights stay as they are.

    `per` tensor: one scale a site, by `scale` the largest magnitude of calibration, or the clipping
    magnitude of least squared error. `per` token: the largest magnitude of the token, of q and k of
    one head's vector, of the probabilities of a query's row. Values v keep the scale of their site:
    their product sums over tokens, and integers of several scales have no sum.

    `unsigned`: sites without a negative value over calibration, as probabilities, have the integers 0
    to 2^b - 1.

    Sources: Jacob et al. 2018 (integer products), Yao et al. 2022, ZeroQuant (a scale for every token).
    """

    name: str = "integer"
    bits: int = 6
    weight_bits: int = 8
    per: str = "token"
    scale: str = "least_error"
    unsigned: bool = False

    neuron = False
    convention = "none"
    rowwise = True

    def __post_init__(self) -> None:
        for option in ("bits", "weight_bits"):
            value = getattr(self, option)
            if not isinstance(value, int) or not BITS[0] <= value <= BITS[1]:
                raise InputError(
                    f"coding.{option}={value!r} for {self.name}: give a whole number from {BITS[0]} to "
                    f"{BITS[1]}"
                )
        for option, allowed in (("per", PER), ("scale", SCALES)):
            if (choice := getattr(self, option)) not in allowed:
                raise InputError(
                    f"coding.{option}={choice!r} for {self.name}: choose {' or '.join(allowed)}"
                )

    @property
    def timesteps(self) -> int:  # type: ignore[override]
        """As many as bits, so that tables have it beside the codes of as many steps."""
        return self.bits

    @property
    def tokenwise(self) -> bool:  # type: ignore[override]
        return self.per == "token"

    @property
    def decode_macs(self) -> int:
        return 1  # the scale of what an accumulator has summed up

    @property
    def gate_comparisons(self) -> int:
        return int(self.tokenwise)  # for the largest of a token

    def decoding(self, p: Params) -> Decoding:
        return replace(super().decoding(p), steps=torch.full(p["scale"].shape, torch.nan))

    @property
    def operand_bits(self) -> int:  # type: ignore[override]
        return self.bits

    def fit(self, atoms: Atoms) -> Fit:
        one_sided = (atoms.range()[0] >= 0) & self.unsigned
        magnitude_bits = torch.where(one_sided, self.bits, self.bits - 1)
        highest = 2.0**magnitude_bits - 1
        scale = atoms.maximum
        if self.scale == "least_error":
            clipped = even_levels(atoms.value, atoms.spread, atoms.errors(), magnitude_bits)
            scale = torch.where(scale > 0, clipped, scale)
        lowest = torch.where(one_sided, 0.0, -highest)
        params = {"scale": scale, "lowest": lowest, "highest": highest}
        if self.tokenwise:
            token = [float(role != SUMMED) for role in atoms.roles]
            params["token"] = torch.tensor(token) if token else torch.ones_like(scale)
        return Fit(params)

    def encode(self, x: Tensor, p: Params) -> NoReturn:
        raise NotImplementedError(f"{self.name} has integers in place of spikes: no spike train")

    def table(self, p: Params) -> Tensor:
        """Every magnitude, [*S, 2^b], those beyond the highest of a site repeated; with a scale of the
        token in units of the site's."""
        codes = torch.arange(2.0**self.bits, device=p["scale"].device)
        codes = torch.minimum(codes, p["highest"][..., None])
        return codes * (p["scale"] / p["highest"])[..., None]

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        x = x.float()
        scale, lowest, highest = (p[name][..., None] for name in ("scale", "lowest", "highest"))
        if self.tokenwise:
            largest = x.abs().amax(-1, keepdim=True)
            scale = torch.where(p["token"][..., None] > 0, largest, scale)
        step = (scale / highest).clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros
        value = (x / step).round().clamp(lowest, highest) * step
        return value, torch.full_like(value, torch.nan)
