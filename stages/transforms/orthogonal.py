"""Orthogonal matrices that are fast to apply, for activations and for weights."""

from __future__ import annotations

import torch
from torch import Tensor


class Orthogonal:
    """x [..., width] -> x · diag(signs) · (H kron O), orthogonal for any width.

    H is the Hadamard matrix of the largest power of two in `width`, over its root; O a random
    orthogonal matrix of the odd rest. Both are drawn from `generator`, in double precision.
    """

    def __init__(self, width: int, generator: torch.Generator, signs: bool = False) -> None:
        block = width & -width
        rest = width // block
        # H of a power of two is the product of two smaller ones, applied one after the other.
        sizes = [2**power for power in range(block.bit_length())]
        left = min(sizes, key=lambda size: size + block // size * rest)
        right = block // left
        drawn = torch.randint(0, 2, (width,), generator=generator) if signs else torch.ones(width)
        self.width = width
        self.signs = drawn.double() * 2 - 1
        self._left = _hadamard(left)
        self._right = torch.kron(_hadamard(right), _orthogonal(rest, generator))
        self._cast: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Compute in float32 at least and return the dtype of x."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        signs, left, right = self._on(x.device, dtype)
        parts = (x.to(dtype) * signs).reshape(-1, left.shape[0], right.shape[0])
        return (left @ (parts @ right)).view(x.shape).to(x.dtype)

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if (device, dtype) not in self._cast:
            with torch.inference_mode(False):  # what is kept must serve every later mode
                signs, left, right = (
                    t.to(device, dtype) for t in (self.signs, self._left, self._right)
                )
            self._cast[device, dtype] = signs, left, right
        return self._cast[device, dtype]


def _hadamard(size: int) -> Tensor:
    """The symmetric orthogonal Hadamard matrix of a power of two (Sylvester)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / size**0.5


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniform (the signs of R taken into Q); [[1]] for size 1."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    return (q * r.diagonal().sign()).contiguous()


class Centred:
    """x [..., width] -> x · B · diag(signs) · Bᵀ, orthogonal, and the same for the mean of x.

    B = H kron C, of the Hadamard matrix and the cosine transform of the odd rest, sends a constant x to
    its first coordinate alone, whose sign stays. So a LayerNorm of x Q is that of x, times Q. `signs`
    are those of `drawn`.
    """

    def __init__(self, drawn: Orthogonal) -> None:
        self.width = drawn.width
        block = self.width & -self.width
        self._signs = drawn.signs.clone()
        self._signs[0] = 1
        sizes = [2**power for power in range(block.bit_length())]
        rest = self.width // block
        left = min(sizes, key=lambda size: size + block // size * rest)
        self._left = _hadamard(left)
        self._right = torch.kron(_hadamard(block // left), _cosines(rest))

    def __call__(self, x: Tensor) -> Tensor:
        """Compute in double precision and return the dtype of x."""
        signs, left, right = (t.to(x.device) for t in (self._signs, self._left, self._right))
        parts = x.double().reshape(-1, left.shape[0], right.shape[0])
        mixed = (left @ (parts @ right)).flatten(1) * signs
        back = left @ (mixed.view(parts.shape) @ right.t())
        return back.view(x.shape).to(x.dtype)


def _cosines(size: int) -> Tensor:
    """The orthogonal cosine transform (DCT-II), its first column constant; [[1]] for size 1."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / size * (place[:, None] + 0.5) * place) * (2 / size) ** 0.5
    matrix[:, 0] = size**-0.5
    return matrix
