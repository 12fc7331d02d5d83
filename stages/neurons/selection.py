"""Softmax, and the sums of values that the spikes of probabilities select, compiled for a CPU.

Most probabilities are too small for a spike, and the value of a key that none selects is not read. So one
pass over a row of scores, while a cache holds it, is softmax, code, count and the product with the values.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from stages.compiler import native
from stages.neurons.stairs import TABLE, Stairs, fits, structure, threads

_FIELDS = {
    "const Table*": ("table",),
    "float*": ("scores", "out", "fired"),
    "const float*": ("bias", "value"),
    "float": ("scaling", "silent"),
    "Size": (
        *("rows", "heads", "queries", "keys", "share", "width"),
        *("value_batch", "value_group", "value_key", "out_batch", "out_query", "out_head"),
    ),
}
_Work, _STRUCT = structure("Work", _FIELDS)
# A vector is as wide as those of the processor. The exponential is that of Cephes, 2^n e^r, with an error
# of two units in the last place.
_SOURCE = (
    TABLE
    + _STRUCT
    + """
#ifdef __AVX512F__
#include <immintrin.h>
#define BYTES 64
#elif __AVX__
#define BYTES 32
#else
#define BYTES 16
#endif
#pragma GCC optimize("fp-contract=fast")
typedef float V __attribute__((vector_size(BYTES)));
typedef int Bits __attribute__((vector_size(BYTES)));
typedef Size Pairs __attribute__((vector_size(BYTES)));
const int LANES = BYTES / 4, SPAN = 512, ROWS = 8;
static V load(const float* x) {
  V v;
  __builtin_memcpy(&v, x, BYTES);
  return v;
}
static V power(V x) {
  const V t = x * 1.44269504f + 12582912.0f, n = t - 12582912.0f;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return x < -87.0f ? V{} : p * (V)(((Bits)t << 23) + (127 << 23));
}
// Exponentials in the place of `keys` scores, less that of the largest, and their sum.
static float powers(float* x, const float* bias, Size keys, float scaling) {
  const Size whole = keys / LANES * LANES;
  float last[LANES];
  for (int j = 0; j < LANES; ++j) last[j] = -__builtin_inff();
  for (Size i = whole; i < keys; ++i) last[i - whole] = x[i] * scaling + (bias ? bias[i] : 0);
  const auto logits = [&](Size i) {
    return bias ? load(x + i) * scaling + load(bias + i) : load(x + i) * scaling;
  };
  V most = load(last), sum = {};
  for (Size i = 0; i < whole; i += LANES) most = logits(i) > most ? logits(i) : most;
  float top = most[0];
  for (int j = 1; j < LANES; ++j) top = most[j] > top ? most[j] : top;
  for (Size i = 0; i < whole; i += LANES) {
    const V e = power(logits(i) - top);
    __builtin_memcpy(x + i, &e, BYTES);
    sum += e;
  }
  const V e = power(load(last) - top);
  __builtin_memcpy(x + whole, &e, 4 * (keys - whole));
  sum += e;
  float total = 0;
  for (int j = 0; j < LANES; ++j) total += sum[j];
  return total;
}
// The places of numbers above `low` among x[start] to x[stop], and those numbers.
static int above(const float* x, int start, int stop, float low, int* place, float* u) {
  int n = 0;
  Bits lane;
  for (int j = 0; j < LANES; ++j) lane[j] = j;
  for (; start + LANES <= stop; start += LANES) {
#if BYTES == 64
    const __mmask16 over = _mm512_cmp_ps_mask(load(x + start), V{} + low, _CMP_GT_OQ);
    if (!over) continue;
    _mm512_storeu_ps(u + n, _mm512_maskz_compress_ps(over, load(x + start)));
    _mm512_storeu_si512(place + n, _mm512_maskz_compress_epi32(over, (__m512i)(lane + start)));
    n += __builtin_popcount(over);
#else
    const Pairs over = (Pairs)(load(x + start) > low);
    Size any = 0;
    for (int j = 0; j < LANES / 2; ++j) any |= over[j];
    if (any)
      for (int j = 0; j < LANES; ++j) {
        place[n] = start + j;
        u[n] = x[start + j];
        n += x[start + j] > low;
      }
#endif
  }
  for (; start < stop; ++start) {
    place[n] = start;
    u[n] = x[start];
    n += x[start] > low;
  }
  return n;
}
static void add(float* __restrict out, Size width, const float* value, Size gap, const int* place,
                const float* u, int n) {
  int k = 0;
  for (; k + 4 <= n; k += 4) {
    const float *a = value + place[k] * gap, *b = value + place[k + 1] * gap;
    const float *c = value + place[k + 2] * gap, *d = value + place[k + 3] * gap;
    for (Size i = 0; i < width; ++i)
      out[i] += (u[k] * a[i] + u[k + 1] * b[i]) + (u[k + 2] * c[i] + u[k + 3] * d[i]);
  }
  for (; k < n; ++k)
    for (Size i = 0; i < width; ++i) out[i] += u[k] * value[place[k] * gap + i];
}
static void attend(const Work& w, Size row) {
  const Size query = row % w.queries, head = row / w.queries % w.heads;
  const Size batch = row / w.queries / w.heads;
  float* x = w.scores + row * w.keys;
  const float* bias = w.bias ? w.bias + (batch * w.queries + query) * w.keys : nullptr;
  const Size keys = bias ? w.keys : w.keys - w.queries + query + 1;
  float* out = w.out + batch * w.out_batch + query * w.out_query + head * w.out_head;
  const float* value = w.value + batch * w.value_batch + head / w.share * w.value_group;
  const float total = powers(x, bias, keys, w.scaling);
  const bool number = total > 0;  // the largest exponential is about 1, as x * scaling is not rounded
  const float low = w.silent * total * 0.999999f;
  for (Size i = 0; i < w.width; ++i) out[i] = number ? 0 : __builtin_nanf("");
  float count = 0;
  for (Size start = 0; number && start < keys; start += SPAN) {
    int place[SPAN + LANES];
    float u[SPAN + LANES];
    const int n = above(x, start, start + SPAN < keys ? start + SPAN : keys, low, place, u);
    for (int k = 0; k < n; ++k) u[k] /= total;
    for (int k = 0; k < n; ++k) {
      const int on = stair(*w.table, bucket(*w.table, u[k]), u[k]);
      u[k] = w.table->value[on];
      if (!bias || bias[place[k]] == 0) count += w.table->spikes[on];
    }
    add(out, w.width, value, w.value_key, place, u, n);
  }
  w.fired[row] = count;
}
static void normalise(const Work& w, Size row) {
  float* x = w.scores + row * w.keys;
  const Size query = row % w.queries, batch = row / w.queries / w.heads;
  const float total = powers(x, w.bias + (batch * w.queries + query) * w.keys, w.keys, w.scaling);
  for (Size i = 0; i < w.keys; ++i) x[i] /= total;
}
template <class F> static void rows(const Work& w, int threads, F of) {
  each((w.rows + ROWS - 1) / ROWS, threads, [&](Size part) {
    const Size first = part * ROWS, end = first + ROWS < w.rows ? first + ROWS : w.rows;
    for (Size row = first; row < end; ++row) of(w, row);
  });
}
extern "C" void selected(const Work* w, int threads) { rows(*w, threads, attend); }
extern "C" void normalised(const Work* w, int threads) { rows(*w, threads, normalise); }
"""
)


class Selection:
    """The code of the probabilities of one site, from its table."""

    def __init__(self, library: ctypes.CDLL, stairs: Stairs) -> None:
        self._selected, self._stairs = library.selected, stairs

    def __call__(
        self,
        scores: Tensor,  # [B, H, Q, K], overwritten
        scaling: float,
        bias: Tensor | None,  # [B, 1, Q, K]
        value: Tensor,  # [B, G, K, D]
        out: Tensor,  # [B, Q, H, D]
    ) -> Tensor:
        """Put what attention gives into `out`, and return the spikes of every row [B, H, Q].

        Without a bias, of `stages.ports.kernels.softmax_kernel`, query i sees the keys up to
        K - Q + i.
        """
        batch, heads, queries, keys = scores.shape
        fired = scores.new_empty(batch, heads, queries)
        strides = dict(
            zip(("value_batch", "value_group", "value_key"), value.stride(), strict=False)
        )
        strides |= zip(("out_batch", "out_query", "out_head"), out.stride(), strict=False)
        work = _Work(
            scores=scores.data_ptr(), scaling=scaling, value=value.data_ptr(),
            bias=None if bias is None else bias.data_ptr(), out=out.data_ptr(), fired=fired.data_ptr(),
            rows=batch * heads * queries, heads=heads, queries=queries, keys=keys,
            share=heads // value.shape[1], width=value.shape[3], silent=self._stairs.silent,
            table=ctypes.addressof(self._stairs.table), **strides,
        )  # fmt: skip
        self._selected(work, threads(scores))
        return fired


def normalised(scores: Tensor, scaling: float, bias: Tensor) -> bool:
    """Put softmax(scores * scaling + bias) in the place of scores [B, H, Q, K], bias [B, 1, Q, K], both
    float32 in one piece on a CPU; say so, or that nothing is compiled."""
    built = _library()
    if built is not None and scores.numel():
        batch, heads, queries, keys = scores.shape
        work = _Work(
            scores=scores.data_ptr(), scaling=scaling, bias=bias.data_ptr(),
            rows=batch * heads * queries, heads=heads, queries=queries, keys=keys,
        )  # fmt: skip
        built.normalised(work, threads(scores))
    return built is not None


def readable(scores: Tensor, bias: Tensor | None) -> bool:
    """Whether scores [B, H, Q, K] and their bias [B, 1, Q, K], if there is one, are float32 in one piece
    on a CPU: a bias may else be one of all rows of a batch."""
    batch, _, queries, keys = scores.shape
    shaped = bias is None or bias.shape == (batch, 1, queries, keys)
    return shaped and all(fits(x) and x.is_contiguous() for x in (scores, bias) if x is not None)


def _library() -> ctypes.CDLL | None:
    arguments = (ctypes.POINTER(_Work), ctypes.c_int)
    return native(_SOURCE, selected=arguments, normalised=arguments)


def selection(stairs: Stairs) -> Selection | None:
    """The compiled code of probabilities; None where nothing is compiled, and of a code that has a value
    or a spike for zero."""
    built = _library()
    loud = stairs.zero or stairs.spikes_of_zero
    return None if built is None or loud else Selection(built, stairs)
