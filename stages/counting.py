"""Counting of values into the bins of a histogram as they stand in memory, compiled for a CPU."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from stages.compiler import native

ALONE = 1 << 18  # values that are counted as fast by one thread
# The bins are those of `stages.sketch.Grid.codes`.
_SOURCE = """
extern "C" void counted(const float* x, long long n, int shift, int base, int magnitudes,
                        long long* count) {
  for (; n > 0; n -= 256, x += 256) {
    const int some = n < 256 ? n : 256;
    int code[256];
    for (int i = 0; i < some; ++i) {
      int bits;
      __builtin_memcpy(&bits, x + i, 4);
      const int bin = ((bits & 0x7fffffff) >> shift) - base;
      code[i] = (bin < 0 ? 0 : bin < magnitudes ? bin : magnitudes - 1) + (bits >> 31 & magnitudes);
    }
    for (int i = 0; i < some; ++i) ++count[code[i]];
  }
}
"""
_ARGUMENTS = (ctypes.c_void_p, ctypes.c_longlong, *3 * (ctypes.c_int,), ctypes.c_void_p)


def counted(x: Tensor, shift: int, base: int, magnitudes: int, count: Tensor) -> bool:
    """Add how often every bin is in flat float32 x to count [2 * magnitudes] int64, a share a thread;
    say whether that was done, which takes a compiler and a CPU."""
    fits = x.is_cpu and count.is_cpu and x.dtype == torch.float32 and x.is_contiguous()
    library = native(_SOURCE, counted=_ARGUMENTS) if fits else None
    if library is None:
        return False

    def add(part: Tensor, sums: Tensor) -> Tensor:
        place, sums_place = part.data_ptr(), sums.data_ptr()
        library.counted(place, part.numel(), shift, base, magnitudes, sums_place)
        return sums

    threads = torch.get_num_threads()
    if threads == 1 or len(x) < ALONE:
        add(x, count)
        return True
    parts = x.chunk(threads)
    sums = [count, *(torch.zeros_like(count) for _ in parts[1:])]
    for each in list(pool(threads).map(add, parts, sums))[1:]:
        count += each
    return True


@functools.lru_cache(maxsize=1)
def pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
