"""The fast path of a coding as compiled kernels: one pass over memory, spikes summed on the way.

Where there is no compiler the same expression runs eagerly, see `stages.compiler`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from stages.codings.base import Coding
from stages.compiler import fused
from stages.neurons.channels import CENTRE, CHANNEL, centre, unit, unscaled
from stages.neurons.lookup import Lookup, lookups
from stages.neurons.search import Search, fits, search
from stages.neurons.selection import Selection, library, selection
from stages.neurons.spikes import Params

# Below this many values a call is too short to repay a compiled kernel's guards, and single-token
# shapes would be specialised one by one.
EAGER_BELOW = 1 << 14
TABLE_AFTER = 8  # calls on so few values, a token each: after them a table of the code pays
TABLES_AT_ONCE = 64
SEARCHED_BELOW = 1 << 16  # values that one thread searches sooner than a compiled kernel has begun
MOST_SELECTIONS = 512
# Of codings with parameters, which one process binds to models again and again; of 40 kB each.
SELECTIONS: dict[Any, Selection | None] = {}

# Spikes that are not counted may be any tensor.
RowKernel = Callable[[Tensor, Params], tuple[Tensor, Tensor]]
SoftmaxKernel = Callable[[Tensor, float, Tensor, Params], tuple[Tensor, Tensor]]


def masked_softmax(scores: Tensor, scaling: float, mask: Tensor) -> Tensor:
    """Compute softmax(scores * scaling) over the allowed keys, in float32; exactly zero elsewhere.

    scores [B, H, Q, K], mask [B, 1, Q, K] bool.
    """
    lowest = torch.finfo(torch.float32).min
    return torch.where(mask, scores.float() * scaling, lowest).softmax(-1)


def _rows(
    quantise: Callable[[Tensor, Params], tuple[Tensor, Tensor]],
    counted: bool,
    x: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    p: Params,
) -> tuple[Tensor, Tensor]:
    """The code of x about its means and in units of its scales, and the spikes of every row."""
    u = x if mean is None else x.float() - mean
    if scale is None:
        value, spikes = quantise(u, p)
    else:
        value, spikes = quantise(u.float() / scale, p)
        value = value * scale
    if mean is not None and mean.dim() == 1:
        value = value + mean
    return value.to(x.dtype), spikes.sum(-1) if counted else spikes.new_empty(0)


@functools.lru_cache(maxsize=64)
def row_kernel(coding: Coding, counted: bool) -> RowKernel:
    """Make (x [..., C], parameters) -> (coded x, spikes of every row [...] or an empty tensor).

    Heads [B, H, S, D] are coded without their means, see `stages.neurons.channels.left_out`.
    """

    def kernel(
        x: Tensor, scale: Tensor | None, mean: Tensor | None, p: Params
    ) -> tuple[Tensor, Tensor]:
        return _rows(coding.quantise, counted, x, scale, mean, p)

    if coding.tokenwise and not coding.rowwise:  # its layout is part of the code
        return lambda x, p: kernel(x, None, None, p)
    fast = fused(kernel, one_pass=True)

    def call(x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        scale, mean = unit(x, p), centre(x, p)
        # Heads have scales and means of their own, so they stay apart.
        heads = any(each is not None and each.dim() == 3 for each in (scale, mean))
        flat = x.contiguous() if heads else x.reshape(-1, x.shape[-1])
        made = fast if x.numel() >= EAGER_BELOW else kernel
        value, spikes = made(flat, scale, mean, unscaled(p))
        return value.view(x.shape), spikes

    return call


def _softmax(scores: Tensor, scaling: float, bias: Tensor) -> Tensor:
    """The softmax in float32, whose exponentials pass through the memory of the scores where they can."""
    logits = scores.float() * scaling + bias
    power = torch.exp(logits - logits.amax(-1, keepdim=True))
    if scores.dtype == torch.float32:
        power = scores.copy_(power)
    return power / power.sum(-1, keepdim=True)


def _in_place(scores: Tensor, scaling: float, bias: Tensor) -> Tensor:
    return _put(_softmax(scores, scaling, bias), scores)


def _put(value: Tensor, scores: Tensor) -> Tensor:
    """The value where the scores stand; beside them of one head, whose softmax Inductor does not
    compile in place (findings/inductor_softmax_in_place.sh)."""
    return value.to(scores.dtype) if scores.shape[1] == 1 else scores.copy_(value)


_dense_softmax = fused(_in_place)


def dense_softmax(scores: Tensor, scaling: float, bias: Tensor) -> Tensor:
    """Probabilities of scores [B, H, Q, K], as a rule in their place; bias as of `softmax_kernel`."""
    made = _in_place if scores.numel() < EAGER_BELOW else _dense_softmax
    probs: Tensor = made(scores, scaling, bias)
    return probs


@functools.lru_cache(maxsize=64)
def softmax_kernel(coding: Coding, counted: bool) -> SoftmaxKernel:
    """Make (scores [B, H, Q, K], scaling, bias, parameters) -> (coded probabilities, spikes [B, H, Q]).

    The probabilities stand where the scores stood, as a rule. bias [B, 1, Q, K] float32 is 0, or the
    lowest number where a query does not see a key: a sum is read in a third of the time that a boolean
    takes.
    """

    def probabilities(
        scores: Tensor, scaling: float, bias: Tensor, p: Params
    ) -> tuple[Tensor, Tensor]:
        if coding.replaces_softmax:
            return coding.softmax(scores, scaling, bias == 0, p)
        return coding.quantise(_softmax(scores, scaling, bias), p)

    def kernel(scores: Tensor, scaling: float, bias: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        value, spikes = probabilities(scores, scaling, bias, p)
        # A fitted threshold may lie below v0, and such a neuron would fire at masked zeros.
        seen = torch.where(bias == 0, spikes, 0).sum(-1) if counted else spikes.new_empty(0)
        return _put(value, scores), seen

    fast = fused(kernel, one_pass=True)

    def call(scores: Tensor, scaling: float, bias: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        small = scores.numel() < EAGER_BELOW or scores.shape[2] == 1
        coded: tuple[Tensor, Tensor] = (kernel if small else fast)(scores, scaling, bias, p)
        return coded

    return call


class Tables:
    """Tables of the codes of a model, made together for all sites that have coded few values."""

    def __init__(self) -> None:
        self._waiting: list[ShortKernel] = []

    def expect(self, kernel: ShortKernel) -> None:
        """Make a table for this site with those of the others."""
        self._waiting.append(kernel)

    def make(self) -> None:
        """Give all sites that wait their tables."""
        groups: dict[Any, list[ShortKernel]] = {}
        for kernel in self._waiting:
            shapes = tuple((name, each.shape) for name, each in kernel.params.items())
            groups.setdefault((kernel.coding, shapes), []).append(kernel)
        self._waiting = []
        for (coding, _), kernels in groups.items():
            for start in range(0, len(kernels), TABLES_AT_ONCE):
                some = kernels[start : start + TABLES_AT_ONCE]
                made = lookups(coding, [kernel.params for kernel in some])
                for kernel, table in zip(some, made, strict=True):
                    kernel.hold(table)


class ShortKernel:
    """Codes few values of one site by a table of its code, once it has been asked often enough."""

    def __init__(self, coding: Coding, params: Params, counted: bool, tables: Tables) -> None:
        self.coding, self.params = coding, unscaled(params)
        self.table: Lookup | None = None
        # Of values that are neither counted nor in units of their channels, where it is compiled.
        self._search: Search | None = None
        self._plain = not counted and CHANNEL not in params and CENTRE not in params
        self._counted, self._tables, self._calls = counted, tables, 0

    def hold(self, table: Lookup | None) -> None:
        """Code by this table, if there is one."""
        self.table = table
        self._search = (
            search(table.edge, table.value) if table is not None and self._plain else None
        )

    def values(self, x: Tensor) -> Tensor | None:
        """The codes of few values by a compiled search, where there is one; None else."""
        found = self._search
        return None if found is None or not _short(x, SEARCHED_BELOW) else found.values(x)

    def replace(self, x: Tensor, first: int) -> bool:
        """Put the codes of few tokens of x [B, G, S, D] from `first` on in their place by a compiled
        search, where there is one; say so."""
        found = self._search
        batch, groups, tokens, width = x.shape
        few = batch * groups * (tokens - first) * width < SEARCHED_BELOW
        return found is not None and few and found.replace(x, first)

    def probabilities(self, scores: Tensor, scaling: float, bias: Tensor) -> Tensor | None:
        """The codes of the softmax of one query, likewise."""
        found = self._search
        if found is None or not _short(scores, SEARCHED_BELOW):
            return None
        return found.softmax(scores, scaling, bias)

    def attend(
        self,
        scores: Tensor,
        scaling: float,
        bias: Tensor | None,
        value: Tensor,
        out: Tensor,
    ) -> Tensor | None:
        """Put what attention gives into `out` by a compiled `Selection`, where there is one, and return
        the spikes of every row; None else, and of few scores."""
        batch, _, queries, keys = scores.shape
        few = scores.numel() < EAGER_BELOW or self.coding.replaces_softmax
        biased = bias is None or (fits(bias) and bias.shape == (batch, 1, queries, keys))
        given = (value.dtype, value.is_cpu, value.stride(-1)) == (torch.float32, True, 1)
        given = given and value.shape[2:] == (keys, out.shape[-1])
        if few or not biased or not given or not fits(scores):
            return None
        found = self._selection
        return None if found is None else found(scores, scaling, bias, value, out)

    @functools.cached_property
    def _selection(self) -> Selection | None:
        if library() is None:
            return None
        own = ((name, x.shape, x.cpu().numpy().tobytes()) for name, x in self.params.items())
        key = (self.coding, *own)
        with suppress(KeyError):
            return SELECTIONS[key]
        if len(SELECTIONS) >= MOST_SELECTIONS:
            SELECTIONS.clear()
        (table,) = lookups(self.coding, [self.params])
        found = None if table is None else selection(table)
        SELECTIONS[key] = found
        return found

    def ready(self, x: Tensor) -> bool:
        """Whether there is a table and x is to be coded by it."""
        if not _short(x, EAGER_BELOW) or torch.compiler.is_compiling():
            return False  # a trace of torch.compile has no use for an array of NumPy
        self._calls += 1
        if self._calls == 1:
            self._tables.expect(self)
        elif self._calls == TABLE_AFTER and self.table is None:
            self._tables.make()
        if self.table is not None and self.table.edge.device != x.device:
            self.hold(self.table.to(x.device))
        return self.table is not None

    def rows(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """What `row_kernel` gives."""
        if self._plain:
            value = self._read(x, p)[0].to(x.dtype)
            return value, value
        return _rows(self._read, self._counted, x, unit(x, p), centre(x, p), p)

    def softmax(self, scores: Tensor, scaling: float, bias: Tensor) -> tuple[Tensor, Tensor]:
        """What `softmax_kernel` gives where the coding does not replace the softmax."""
        value, spikes = self._read(_softmax(scores, scaling, bias), {})
        seen = torch.where(bias == 0, spikes, 0).sum(-1) if self._counted else spikes
        return value.to(scores.dtype), seen

    def _read(self, u: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        assert self.table is not None
        value, stair = self.table(u)
        return value, self.table.spikes.take(stair) if self._counted else value


def _short(x: Tensor, limit: int) -> bool:
    """Whether values are fewer than the limit, and no gradient is asked of them."""
    return x.numel() < limit and not (torch.is_grad_enabled() and x.requires_grad)
