"""Counting of values into the bins of a histogram as they stand in memory, compiled for a CPU."""

from __future__ import annotations

import ctypes
import functools
import threading

import torch
from torch import Tensor

from stages.compiler import native

# `counted` reads x [rows, width] once. A share of the columns is a thread's, which counts into a histogram
# of its own: `few` [threads, bins], zero before and after. Of 16 rows and 256 columns, which stay in a
# cache, the squares of a channel are added up in float32, those of all in float64. The bins are those of
# `stages.sketch.Grid.codes`; a key has the order of the values. Two bins are read at once, as reading them
# one by one takes longer than counting.
_SOURCE = """
typedef unsigned Few;
typedef int Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
struct Share { Ints low, high, least; Size zeros; };

static Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
static Ints larger(Ints a, Ints b) { return a > b ? a : b; }
static float value(int key) {
  const int bits = key ^ (key >> 31 & 0x7fffffff);
  float made;
  __builtin_memcpy(&made, &bits, 4);
  return made;
}

static Share share(const float* x, Size rows, Size width, Size from, Size to, int shift, int base,
                   int magnitudes, Few* few, int* absmax, double* square) {
  const Ints all = Ints{} + 0x7fffffff, last = Ints{} + (magnitudes - 1);
  Share ends = {all, ~all, all, 0};
  Ints zeros = {};
  for (Size top = 0; top < rows; top += 16)
    for (Size left = from; left < to; left += 256) {
      const int some = to - left < 256 ? to - left : 256, blocks = (some + 15) / 16;
      Ints most[16] = {};
      Floats sum[16] = {};
      for (Size row = top; row < rows && row < top + 16; ++row) {
        const float* at = x + row * width + left;
        float filled[256];
        Ints code[16];
        if (some % 16) {
          for (int i = 0; i < 16 * blocks; ++i) filled[i] = at[i < some ? i : 0];
          at = filled;
        }
        for (int i = 0; i < blocks; ++i) {
          Ints bits;
          __builtin_memcpy(&bits, at + 16 * i, 64);
          const Ints sign = bits >> 31, magnitude = bits & all, none = magnitude == 0;
          code[i] = smaller(larger((magnitude >> shift) - base, Ints{}), last);
          code[i] += sign & magnitudes;
          ends.low = smaller(bits ^ (sign & all), ends.low);
          ends.high = larger(bits ^ (sign & all), ends.high);
          ends.least = smaller(magnitude | (none & all), ends.least);
          zeros -= none;
          if (absmax) {
            Floats u;
            __builtin_memcpy(&u, &bits, 64);
            most[i] = larger(magnitude, most[i]);
            sum[i] += u * u;
          }
        }
        if (*at == 0) ends.zeros -= 16 * blocks - some;
        const unsigned* one = (const unsigned*)code;
        int i = 0;
        for (; i + 1 < some; i += 2) {
          unsigned long long two;
          __builtin_memcpy(&two, one + i, 8);
          ++few[(unsigned)two];
          ++few[two >> 32];
        }
        if (i < some) ++few[one[i]];
      }
      if (absmax)
        for (int i = 0; i < some; ++i) {
          const int old = absmax[left + i], now = most[i / 16][i % 16];
          absmax[left + i] = now > old ? now : old;
          square[left + i] += sum[i / 16][i % 16];
        }
    }
  for (int i = 0; i < 16; ++i) ends.zeros += zeros[i];
  return ends;
}

extern "C" void counted(const float* x, Size rows, Size width, int threads, int shift, int base,
                        int magnitudes, Size surplus, Few* few, Size* count, float* range,
                        int* absmax, double* square) {
  const Size bins = 2 * magnitudes, step = ((width - 1) / threads + 16) / 16 * 16;
  Share ends[threads];
  each(threads, threads, [&](Size t) {
    const Size from = t * step, to = from + step < width ? from + step : width;
    ends[t] = share(x, rows, width, from, to, shift, base, magnitudes, few + t * bins, absmax,
                    square);
  });
  int low = 0x7fffffff, high = ~low, least = low;
  Size zeros = 0;
  for (const Share& of : ends) {
    for (int i = 0; i < 16; ++i) {
      low = of.low[i] < low ? of.low[i] : low;
      high = of.high[i] > high ? of.high[i] : high;
      least = of.least[i] < least ? of.least[i] : least;
    }
    zeros += of.zeros;
  }
  each((bins + 4095) / 4096, threads, [&](Size part) {
    for (Size start = 4096 * part; start < bins && start < 4096 * (part + 1); start += 64) {
      const int some = bins - start < 64 ? bins - start : 64;
      for (int t = 0; t < threads; ++t) {
        Few *of = few + t * bins + start, any = 0;
        for (int i = 0; i < some; ++i) any |= of[i];
        if (any)
          for (int i = 0; i < some; ++i) {
            count[start + i] += of[i];
            of[i] = 0;
          }
      }
    }
  });
  count[0] -= surplus;
  float lowest = value(low);
  if (lowest == 0 && zeros <= surplus) lowest = value(least);
  if (lowest < range[0]) range[0] = lowest;
  if (value(high) > range[1]) range[1] = value(high);
}
"""
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int
_ARGUMENTS = (_POINTER, _SIZE, _SIZE, *4 * (_INT,), _SIZE, *5 * (_POINTER,))


def counted(
    x: Tensor,
    place: tuple[int, int, int],
    surplus: Tensor | int,
    count: Tensor,
    ends: Tensor,
    absmax: Tensor,
    square: Tensor,
) -> bool:
    """Add x [rows, C] to a sketch where it stands, a share a thread; say whether that was done, which
    takes a compiler and a CPU.

    place: shift, first bin and number of magnitudes; count [bins] int64, ends [2] (lowest and highest),
    absmax [C] float32 and square [C] float64, which may be empty. `surplus` zeros are not counted.
    """
    fits = x.is_cpu and count.is_cpu and x.dtype == torch.float32 and x.is_contiguous()
    library = native(_SOURCE, counted=_ARGUMENTS) if fits and x.numel() else None
    if library is None:
        return False
    threads = torch.get_num_threads()
    few = _few(threads, len(count), threading.get_ident())
    channels = [each.data_ptr() if len(each) else None for each in (absmax, square)]
    sums = (few.data_ptr(), count.data_ptr(), ends.data_ptr(), *channels)
    library.counted(x.data_ptr(), *x.shape, threads, *place, int(surplus), *sums)
    return True


@functools.lru_cache(maxsize=4)
def _few(threads: int, bins: int, caller: int) -> Tensor:
    """The histograms of the threads of a caller, whose values of one call are fewer than 2^32."""
    with torch.inference_mode(False):
        return torch.zeros(threads, bins, dtype=torch.int32)
