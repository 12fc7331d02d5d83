"""A compiled search in the table of a code, for values of single tokens on a CPU.

What NumPy searches with branches, half of them guessed wrongly, takes a tenth of the time in arithmetic,
and one call codes in place or divides by the sum of a softmax on the way. The bits are those of
`stages.neurons.lookup.Lookup`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from stages.compiler import native

# `coded` searches 64 values of a row side by side: `stairs` are size - 1 edges and as many values as size,
# a power of two, and what is no number lies above every edge. Fifteen edges that are the same for all are
# compared one by one, sooner than four are looked up for each. `shifted` makes of scores x the exponents
# of their softmax; `share` rows have one bias.
_SOURCE = """
extern "C" void coded(const float* x, Size rows, Size width, Size gap, const float* total,
                      const float* stairs, Size size, float* out) {
  for (Size row = 0; row < rows; ++row, x += gap, out += gap)
    for (Size start = 0; start < width; start += 64) {
      const int some = width - start < 64 ? width - start : 64;
      float u[64] = {};
      int stair[64] = {};
      for (int i = 0; i < some; ++i) u[i] = x[start + i];
      if (total)
        for (int i = 0; i < 64; ++i) u[i] /= total[row];
      const int part = size < 16 ? 1 : size / 16;
      for (int edge = part; edge < size; edge += part)
        for (int i = 0; i < 64; ++i) stair[i] += part & -(int)!(u[i] <= stairs[edge - 1]);
      for (int half = part / 2; half; half /= 2)
        for (int i = 0; i < 64; ++i) stair[i] += half & -(int)!(u[i] <= stairs[stair[i] + half - 1]);
      for (int i = 0; i < some; ++i) out[start + i] = stairs[size - 1 + stair[i]];
    }
}
extern "C" void shifted(float* x, Size rows, Size width, Size share, float scaling,
                        const float* bias) {
  for (Size row = 0; row < rows; ++row, x += width) {
    const float* added = bias + row / share * width;
    float most = -__builtin_inff();
    for (Size i = 0; i < width; ++i) x[i] = x[i] * scaling + added[i];
    for (Size i = 0; i < width; ++i) most = x[i] > most ? x[i] : most;
    for (Size i = 0; i < width; ++i) x[i] -= most;
  }
}
"""
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_longlong
_ARGUMENTS = {
    "coded": (_POINTER, *3 * (_SIZE,), _POINTER, _POINTER, _SIZE, _POINTER),
    "shifted": (_POINTER, *3 * (_SIZE,), ctypes.c_float, _POINTER),
}


class Search:
    """The steps of one site: edge [K] float32 ascending, value [K + 1] of the stairs."""

    def __init__(self, library: ctypes.CDLL, edge: Tensor, value: Tensor) -> None:
        self._size = 1 << len(edge).bit_length()
        stairs = edge.new_full((2 * self._size - 1,), torch.inf)
        stairs[: len(edge)] = edge
        stairs[self._size - 1 :] = value[-1]
        stairs[self._size - 1 :][: len(value)] = value
        self._stairs, self._place = stairs, stairs.data_ptr()
        self._coded, self._shifted = library.coded, library.shifted

    def values(self, x: Tensor) -> Tensor | None:
        """The value of every x; None where x is no float32 in one piece on a CPU."""
        if not fits(x):
            return None
        out = torch.empty_like(x, requires_grad=False)
        number = x.numel()
        self._coded(x.data_ptr(), 1, number, 0, None, self._place, self._size, out.data_ptr())
        return out

    def replace(self, x: Tensor, first: int) -> bool:
        """Put the values of tokens of x [B, G, S, D] from `first` on in their place, if x fits; say so."""
        if not fits(x):
            return False
        tokens, width = x.shape[2:]
        gap, start = tokens * width, x.data_ptr() + 4 * first * width
        rows, new = x.shape[0] * x.shape[1], gap - first * width
        self._coded(start, rows, new, gap, None, self._place, self._size, start)
        return True

    def softmax(self, scores: Tensor, scaling: float, bias: Tensor) -> Tensor | None:
        """The values of softmax(scores * scaling + bias) in the place of scores [B, H, 1, K] of one query;
        bias [B, 1, 1, K]. None where they do not fit."""
        batch, heads, queries, keys = scores.shape
        # as what is read at an address must be there
        one = queries == 1 and bias.shape == (batch, 1, 1, keys)
        if not (one and fits(scores) and fits(bias)):
            return None
        rows, place = batch * heads, scores.data_ptr()
        self._shifted(place, rows, keys, heads, scaling, bias.data_ptr())
        total = scores.exp_().sum(-1, keepdim=True)
        self._coded(place, rows, keys, keys, total.data_ptr(), self._place, self._size, place)
        return scores


def search(edge: Tensor, value: Tensor) -> Search | None:
    """The compiled search of a table; None where it is on another device, or nothing is compiled."""
    library = native(_SOURCE, **_ARGUMENTS) if edge.is_cpu else None
    return None if library is None else Search(library, edge, value)


def fits(x: Tensor) -> bool:
    """Whether x is float32 in one piece on a CPU, and no trace of torch.compile, which would not see what
    is read and written at an address."""
    return (
        x.dtype == torch.float32
        and x.is_cpu
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
    )
