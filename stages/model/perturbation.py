"""A replicate of a measurement: the same model with noise of the last bits on its embedding.

The codes of spiking neurons jump, so a difference in the last bits grows from layer to layer. Repeating
a measurement with such differences shows how far its number can be believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a floating-point number


@dataclass(frozen=True)
class Perturbation:
    """Relative noise, normal with standard deviation `size`, drawn from `seed`; 2e-7 is about the
    rounding error of float32, what another order of summation makes."""

    seed: int
    size: float = 2e-7


@contextmanager
def perturbed(model: PreTrainedModel, perturbation: Perturbation | None) -> Iterator[None]:
    """Let the embedding give x·(1 + size·z), rounded at random, while the context is open.

    z is drawn for every position of a text and every dimension, the same for all texts of a batch and
    for a short text as for the beginning of a long one: numbers depend on no batch size and no device.
    Weights stay as they are. `None` is no perturbation. Raises RuntimeError if the model ran past the
    hook, which would be a replicate that is none.
    """
    if perturbation is None:
        yield
        return
    noise, passes = _Noise(perturbation), 0

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        texts = output.reshape(-1, *output.shape[-2:])  # [B, S, D]
        factor, draw = noise.first(texts.shape[1], texts)
        # One text after the other: in double precision a whole batch would be large.
        return torch.stack([nudged(text, factor, draw) for text in texts]).view_as(output)

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not passes:
        raise RuntimeError(f"{type(model).__name__} did not use its input embedding")


def nudged(x: Tensor, factor: Tensor, draw: Tensor) -> Tensor:
    """x·factor, rounded at random to one of its two neighbours in the dtype of x.

    `factor` is in float64 and `draw` uniform in [0, 1), both of x's shape. The farther neighbour is
    taken with probability |rest| / gap, which makes the mean exact (stochastic rounding, Croci et al.
    2022): in bfloat16, where 2e-7 is far below a last bit, some elements move by that bit, and none
    would if rounded to nearest. In float32 and finer it is nearest rounding up to the last bit, so
    that one formula serves every dtype.
    """
    exact = x.double() * factor
    near = exact.to(x.dtype)
    rest = exact - near.double()
    bits = near.view(_BITS[x.dtype.itemsize])
    # In sign and magnitude the next number away from zero is the next integer.
    other = (bits + torch.sign(rest * near.double()).to(bits.dtype)).view(x.dtype)
    gap = (other.double() - near.double()).abs()
    return torch.where(draw * gap < rest.abs(), other, near)


class _Noise:
    """Factors and draws by position and dimension; more positions leave the first as they are."""

    def __init__(self, perturbation: Perturbation) -> None:
        self._size = perturbation.size
        self._normal, self._uniform = np.random.default_rng(perturbation.seed).spawn(2)
        self._z = self._u = torch.empty(0)

    def first(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """1 + size·z in float64 and u, both [length, D], where `like` [B, length, D] is."""
        more = length - len(self._z), like.shape[-1]
        if more[0] > 0:
            z = self._normal.standard_normal(more, np.float32)
            u = self._uniform.random(more, np.float32)
            self._z = torch.cat([self._z.to(like.device).view(-1, more[1]), self._on(z, like)])
            self._u = torch.cat([self._u.to(like.device).view(-1, more[1]), self._on(u, like)])
        return 1 + self._size * self._z[:length].double(), self._u[:length]

    @staticmethod
    def _on(drawn: np.ndarray, like: Tensor) -> Tensor:
        return torch.from_numpy(drawn).to(like.device)
