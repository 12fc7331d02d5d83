"""The table of a code on a CPU, compiled: of every value its stair, in one pass over memory.

The leading bits of a float32 say which stair it may stand on, so that one comparison decides, whatever
the coding and T. The bits are those of `stages.neurons.lookup.Lookup`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from stages.compiler import native
from stages.neurons.lookup import Lookup

ALONE = 1 << 15  # values that one thread codes sooner than a second has begun
LEAST_OPEN, MOST_OPEN = 2, 18  # bits of a float32 that a bucket leaves open
FEW_BUCKETS, MOST_BUCKETS = 1 << 14, 1 << 16  # with more than the former two edges may share one
_INFINITE, _SMALLEST = 0x7F800000, 0x00800000  # as bits, the latter of the numbers that are normal
_TABLE = {
    "const float*": ("edge", "value", "spikes"),
    "const short*": ("begin",),
    "int": ("low", "high", "shift", "twice"),
}
_WORK = {
    "const float*": ("x", "scale", "mean"),
    "float*": ("out", "fired"),
    "Size": (
        *("rows", "heads", "tokens", "width", "whole"),
        *("x_batch", "x_head", "x_token", "out_batch", "out_head", "out_token"),
    ),
}
_KINDS: dict[str, Any] = {"float": ctypes.c_float, "int": ctypes.c_int, "Size": ctypes.c_longlong}


def structure(name: str, fields: dict[str, tuple[str, ...]]) -> tuple[type[ctypes.Structure], str]:
    """A structure of these fields, for ctypes and in C++."""
    pairs = [(kind, field) for kind, names in fields.items() for field in names]
    kinds = [(field, _KINDS.get(kind, ctypes.c_void_p)) for kind, field in pairs]
    members = "".join(f"{kind} {field}; " for kind, field in pairs)
    return type(name, (ctypes.Structure,), {"_fields_": kinds}), f"struct {name} {{{members}}};\n"


Table, _STRUCT = structure("Table", _TABLE)
Work, _WORK_STRUCT = structure("Work", _WORK)
# A bucket of either sign, and one of what is no number; `begin` is the stair of its lowest value.
TABLE = (
    _STRUCT
    + """
static inline int bucket(const Table& t, float u) {
  int bits;
  __builtin_memcpy(&bits, &u, 4);
  const int size = bits & 0x7fffffff, part = size >> t.shift;
  int k = part < t.low ? t.low : part > t.high ? t.high : part;
  if (size > 0x7f800000) k = t.high + 1;
  return k - t.low + (bits < 0 ? t.high - t.low + 2 : 0);
}
static inline int stair(const Table& t, int bucket, float u) {
  int s = t.begin[bucket];
  s += u > t.edge[s];  // a branch would be guessed wrongly half of the time
  return t.twice ? s + (u > t.edge[s]) : s;
}
"""
)
# Values about their means and in units of their scales, both [heads, width]; `whole`: what is given has
# the means in it. Blocks are copied, so that a code may stand where its value stood; so is the table, as
# a compiler would else read its fields again after every place that is written.
_SOURCE = (
    TABLE
    + _WORK_STRUCT
    + """
const int BLOCK = 64, VALUES = 1 << 14;
static inline __attribute__((always_inline)) float code(const Table t, const float* u, float* y,
                                                        const int some, const bool counted) {
  int place[BLOCK];
  float count = 0;
  for (int i = 0; i < BLOCK; ++i) place[i] = bucket(t, u[i]);
#pragma GCC unroll 8
  for (int i = 0; i < some; ++i) {
    const int s = stair(t, place[i], u[i]);
    y[i] = t.value[s];
    if (counted) count += t.spikes[s];
  }
  return count;
}
static inline __attribute__((always_inline)) float part(const Table& t, const float* x, float* out,
    const float* scale, const float* mean, const bool whole, const int some, const bool counted) {
  float u[BLOCK] = {}, y[BLOCK];
  for (int i = 0; i < some; ++i) u[i] = x[i];
  if (mean)
    for (int i = 0; i < some; ++i) u[i] -= mean[i];
  if (scale)
    for (int i = 0; i < some; ++i) u[i] /= scale[i];
  const float count = code(t, u, y, some, counted);
  if (scale)
    for (int i = 0; i < some; ++i) y[i] *= scale[i];
  if (whole)
    for (int i = 0; i < some; ++i) y[i] += mean[i];
  for (int i = 0; i < some; ++i) out[i] = y[i];
  return count;
}
template <bool counted> static void row(const Table& t, const Work& w, Size r) {
  const Size token = r % w.tokens, head = r / w.tokens % w.heads, batch = r / w.tokens / w.heads;
  const float* x = w.x + batch * w.x_batch + head * w.x_head + token * w.x_token;
  float* out = w.out + batch * w.out_batch + head * w.out_head + token * w.out_token;
  const float* scale = w.scale ? w.scale + head * w.width : nullptr;
  const float* mean = w.mean ? w.mean + head * w.width : nullptr;
  float count = 0;
  Size i = 0;
  for (; i + BLOCK <= w.width; i += BLOCK)
    count += part(t, x + i, out + i, scale ? scale + i : nullptr, mean ? mean + i : nullptr, w.whole,
                  BLOCK, counted);
  if (i < w.width)
    count += part(t, x + i, out + i, scale ? scale + i : nullptr, mean ? mean + i : nullptr, w.whole,
                  w.width - i, counted);
  if (counted) w.fired[r] = count;
}
extern "C" void coded(const Table* t, const Work* w, int threads) {
  const Size some = w->width < VALUES ? VALUES / w->width : 1;
  each((w->rows + some - 1) / some, threads, [&](Size part) {
    const Size first = part * some, end = first + some < w->rows ? first + some : w->rows;
    for (Size r = first; r < end; ++r) w->fired ? row<true>(*t, *w, r) : row<false>(*t, *w, r);
  });
}
extern "C" void plain(const Table* t, const float* x, float* out, Size number) {
  for (Size i = 0; i < number; i += BLOCK)
    part(*t, x + i, out + i, nullptr, nullptr, false, number - i < BLOCK ? number - i : BLOCK, false);
}
"""
)
_POINTER = ctypes.c_void_p
_ARGUMENTS = {
    "coded": (_POINTER, _POINTER, ctypes.c_int),
    "plain": (_POINTER, _POINTER, _POINTER, ctypes.c_longlong),
}


class Stairs:
    """The compiled table of one site."""

    def __init__(
        self, library: ctypes.CDLL, table: Lookup, shift: int, low: int, high: int, twice: bool
    ) -> None:
        self._coded, self._plain = library.coded, library.plain
        edge = torch.cat([table.edge, table.edge[-1:]])  # the stair of what is no number has one
        begin = torch.searchsorted(table.edge, _lowest(shift, low, high), side="left").short()
        begin[[high - low + 1, -1]] = len(table.edge)
        self._kept = (edge, table.value, table.spikes.float(), begin)
        self.silent = float(edge[begin[0]])  # the largest number with the code of zero
        self.zero = float(table.value[begin[0]])
        self.spikes_of_zero = float(table.spikes[begin[0]])
        self.table = Table(*(each.data_ptr() for each in self._kept), low, high, shift, twice)
        self._place = ctypes.byref(self.table)

    def __deepcopy__(self, memo: object) -> Stairs:
        return self  # never changed, and at an address

    def values(self, x: Tensor) -> Tensor:
        """The value of every x in one piece, of few."""
        out = torch.empty_like(x, requires_grad=False)
        self._plain(self._place, x.data_ptr(), out.data_ptr(), x.numel())
        return out

    def rows(
        self,
        x: Tensor,  # [..., C] or [B, H, S, D]
        out: Tensor,
        scale: Tensor | None = None,  # [C] or [H * D] float32
        mean: Tensor | None = None,
        counted: bool = False,
    ) -> Tensor | None:
        """Put the values of x about the means and in units of the scales into `out`, which may be x, and
        return the spikes of every row [...] where they are counted. Both are float32 on the CPU, whose
        channels lie side by side; values of heads are without their means, see `stages.neurons.channels`.
        """
        fired = x.new_empty(x.shape[:-1]) if counted else None
        number, width, heads = x.numel(), x.shape[-1], x.dim() == 4
        if number:
            places = (
                None if each is None else each.data_ptr() for each in (x, scale, mean, out, fired)
            )
            shape = x.shape[1:3] if heads else (1, number // width)
            whole = mean is not None and not heads
            gaps = [
                gap for each in (x, out) for gap in (each.stride()[:3] if heads else (0, 0, width))
            ]
            work = Work(*places, number // width, *shape, width, whole, *gaps)
            self._coded(self._place, ctypes.byref(work), threads(x))
        return fired


def stairs(table: Lookup) -> Stairs | None:
    """The compiled table; None where it is on another device, where nothing is compiled, and of stairs
    too narrow for buckets."""
    built = library() if table.edge.is_cpu else None
    place = None if built is None else _buckets(table.edge[:-1])
    return None if built is None or place is None else Stairs(built, table, *place)


def library() -> ctypes.CDLL | None:
    """What is compiled once for all tables; None where nothing is compiled."""
    return native(_SOURCE, **_ARGUMENTS)


def threads(x: Tensor) -> int:
    """How many share out the values of x."""
    return torch.get_num_threads() if x.numel() >= ALONE else 1


def fits(x: Tensor) -> bool:
    """Whether what is read and written at the address of x is float32 on a CPU."""
    return x.dtype == torch.float32 and x.is_cpu and addressed(x)


def addressed(x: Tensor) -> bool:
    """Whether x has an address, of no gradient and of no trace, which does not see what is read there."""
    return (
        type(x) is Tensor
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _buckets(edge: Tensor) -> tuple[int, int, int, bool] | None:
    """How many bits a bucket leaves open, the first and the last bucket, and whether one has two edges."""
    size = edge.abs().view(torch.int32).clamp(min=_SMALLEST)
    normal = size[size > _SMALLEST] if bool((size > _SMALLEST).any()) else torch.tensor([_SMALLEST])
    ends = int(normal.min()), int(normal.max())
    for most, limit in ((1, FEW_BUCKETS), (2, MOST_BUCKETS)):
        same = (edge < 0)[most:] == (edge < 0)[:-most]
        apart = (size[most:] ^ size[:-most])[same]  # the first bit says which bucket is too wide
        open_bits = min(MOST_OPEN, int(apart.min()).bit_length() - 1) if len(apart) else MOST_OPEN
        if open_bits >= LEAST_OPEN:
            low, high = (ends[0] >> open_bits) - 1, (ends[1] >> open_bits) + 1
            if 2 * (high - low + 2) <= limit:
                return open_bits, low, high, most > 1
    return None


def _lowest(shift: int, low: int, high: int) -> Tensor:
    """The lowest value of every bucket."""
    first = torch.arange(low, high + 2) << shift
    last = (first + (1 << shift) - 1).clamp(max=_INFINITE)
    first[0], last[high - low] = 0, _INFINITE
    bits = torch.stack([first.clamp(max=_INFINITE), last]).int().view(torch.float32)
    return torch.cat([bits[0], -bits[1]])
