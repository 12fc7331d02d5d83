"""Who sees whom in a forward pass, and what attention keeps from layer to layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MASK_ROWS = 256
KEPT_PAIRS = 1 << 23  # of a pass whose blocks are kept from layer to layer


@dataclass(frozen=True)
class View:
    """Who sees whom in a block of queries.

    mask [B, 1, Q, K] bool, seen [B, Q]: keys seen by each query, real [B, Q] bool or None (all).
    """

    mask: Tensor
    seen: Tensor
    real: Tensor | None

    def block(self, rows: slice, queries: slice, keys: int) -> View:
        """Return the block of these rows of the batch and queries, over the first `keys` keys."""
        real = None if self.real is None else self.real[rows, queries]
        # Contiguous, so that compiled kernels see one layout only.
        mask = self.mask[rows, :, queries, :keys].contiguous()
        return View(mask, self.seen[rows, queries], real)

    @functools.cached_property
    def bias(self) -> Tensor:
        """What is added to scores [B, 1, Q, K] float32: 0, or the lowest number where the mask forbids."""
        return torch.where(self.mask, 0.0, torch.finfo(torch.float32).min)


@dataclass(frozen=True)
class Visibility:
    """A view of all queries with what is derived from it once per forward pass.

    watched [B, K]: real queries that see each key; fresh [B, K]: keys of this pass that are real;
    reach [Q]: how many leading keys hold all that a query sees in any row; causal: whether every query
    sees all keys up to itself.
    """

    view: View
    watched: Tensor
    fresh: Tensor | None
    reach: tuple[int, ...]
    causal: bool
    _kept: dict[tuple[int, ...], View] = field(default_factory=dict)

    @functools.cached_property
    def asked(self) -> tuple[Tensor | None, Tensor]:
        """Which queries of every head are real [B, 1, Q], None for all, and the keys that each reads."""
        real, seen = self.view.real, self.view.seen
        if real is None:
            return None, seen[:, None]
        return real[:, None], (seen * real)[:, None]

    def marked(self, groups: int) -> tuple[Tensor | None, Tensor]:
        """Which keys of every head are new and real [B, 1, K], None for all, and the real queries that
        see each in `groups` heads."""
        fresh = None if self.fresh is None else self.fresh[:, None]
        return fresh, self.watched[:, None] * groups

    def block(self, rows: slice, queries: slice, keys: int) -> View:
        """Return a block of the view; small ones are the same for every layer."""
        place = rows.start, rows.stop, queries.start, queries.stop, keys
        if place in self._kept:
            return self._kept[place]
        view = self.view.block(rows, queries, keys)
        if self.view.mask.numel() <= KEPT_PAIRS:
            self._kept[place] = view
        return view


class ForwardState:
    """What the current forward pass knows of its tokens: pads, who sees whom, whether its cache keeps
    codes, and whether what was cached before it are codes."""

    keeps = kept = False
    cache: Any = None

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self._visibility: dict[int, tuple[Tensor, Visibility]] = {}
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def holds(self, module: nn.Module, key: Tensor) -> bool:
        """Whether the cache of this pass keeps codes, and the keys of an attention module are its own
        memory: those that are made anew of what is cached hold no codes."""
        index = getattr(module, "layer_idx", None)
        if not self.keeps or not isinstance(index, int) or index >= len(self.cache.layers):
            return False
        cached = self.cache.layers[index].keys
        if cached is None:  # this layer writes into no cache
            return False
        if cached is key:
            return True
        return cached.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()

    def begin(self, attention_mask: Tensor | None, length: int) -> None:
        """Start a pass of `length` new tokens; `attention_mask` [B, past + length] marks pads."""
        self._visibility.clear()
        self.real = None
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -length:].bool()
            self.real = None if bool(real.all()) else real

    def real_at(self, x: Tensor) -> Tensor | None:
        """Return which new tokens are real, where x is: layers may be spread over devices."""
        return None if self.real is None else self.real.to(x.device)

    def visibility(self, mask: Tensor) -> Visibility:
        if id(mask) not in self._visibility:
            self._visibility[id(mask)] = (mask, _visibility(mask, self.real_at(mask)))
        return self._visibility[id(mask)][1]

    def buffer(self, size: int, like: Tensor) -> Tensor:
        """Return memory of `size` values on the device and of the dtype of `like`, the same for every
        block: the pages of fresh memory cost more than the products that fill them."""
        key = like.device, like.dtype
        if key not in self._buffers or len(self._buffers[key]) < size:
            with torch.inference_mode(False):  # a later pass may run outside of that mode
                self._buffers[key] = torch.empty(size, device=like.device, dtype=like.dtype)
        return self._buffers[key][:size]


def _visibility(mask: Tensor, real: Tensor | None) -> Visibility:
    """mask [B, 1, Q, K] bool, real [B, Q] bool or None."""
    queries, keys = mask.shape[-2:]
    fresh = None
    if real is not None or keys != queries:
        new = torch.ones(mask.shape[0], queries, dtype=torch.bool, device=mask.device)
        fresh = functional.pad(new if real is None else real, (keys - queries, 0))
    place = torch.arange(1, keys + 1, dtype=torch.int32, device=mask.device)
    watched = torch.zeros(mask.shape[0], keys, dtype=torch.int64, device=mask.device)
    seen, reach = [], []
    for start in range(0, queries, MASK_ROWS):  # whole numbers for all pairs at once would be large
        part = mask[:, 0, start : start + MASK_ROWS]
        seen.append(part.sum(-1))
        reach.append((part.any(0) * place).amax(-1))
        if real is not None:
            part = part & real[:, start : start + MASK_ROWS, None]
        watched += part.sum(-2)
    view, last = View(mask, torch.cat(seen, 1), real), torch.cat(reach)
    causal = keys == queries and bool((view.seen == place).all() & (last == place).all())
    return Visibility(view, watched, fresh, tuple(last.tolist()), causal)
