"""Who sees whom in a forward pass, and what attention keeps from layer to layer."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from stages.errors import InputError

MASK_ROWS = 256
KEPT_PAIRS = 1 << 23  # of a pass whose blocks are kept from layer to layer


class CausalMask(Tensor):
    """Stands for the mask [B, 1, Q, K] bool by which query i sees the keys up to K - Q + i, without its
    memory: 64 MB of a pass of 8192 tokens.

    An operation on it is one on the mask itself, so that no reader misses it; only a change of device
    leaves it what it is, and a write, which would be lost, is refused. Its memory is a False for all
    pairs, by which no query would see anything.
    """

    @classmethod
    def of(cls, batch: int, queries: int, keys: int, device: Any) -> CausalMask:
        forbidden = torch.zeros((), dtype=torch.bool, device=device)
        return forbidden.expand(batch, 1, queries, keys).as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.to and isinstance(args[0], cls):
                batch, _, queries, keys = args[0].shape
                one = func(torch.zeros_like(args[0][:1, :1, :1, :1]), *args[1:], **kwargs or {})
                if one.dtype == torch.bool:
                    same = one.device == args[0].device
                    return args[0] if same else cls.of(batch, queries, keys, one.device)
            name = getattr(func, "__name__", "")
            written = name == "__setitem__" or name.endswith("_") and not name.endswith("__")
            if written and isinstance(args[0], cls):
                raise InputError(f"no mask was made to write to ({name}): write to mask.clone()")
            if func not in _SIZES:
                args, kwargs = tree_map_only(cls, cls.made, (args, kwargs))
            return func(*args, **kwargs or {})

    def made(self) -> Tensor:
        """Return the mask itself."""
        batch, _, queries, keys = self.shape
        place = torch.arange(keys, device=self.device)
        return (place <= place[keys - queries :, None]).expand(batch, 1, queries, keys)


# What is asked of a tensor without a look at its values; torch.compile asks the last six of what is given
# to a part of a model that is compiled by itself.
_SIZES = {Tensor.dim, Tensor.size, Tensor.numel, Tensor.__len__}
_SIZES |= {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "_base")}
_SIZES |= {Tensor._is_view, Tensor.is_inference, Tensor.stride, Tensor.storage_offset}
_SIZES.add(Tensor.untyped_storage)


@dataclass(frozen=True)
class View:
    """Who sees whom in a block of queries.

    pairs [B, 1, Q, K]: the mask, bool, or what stands for it; seen [B, Q]: keys seen by each query, real
    [B, Q] bool or None (all).
    """

    pairs: Tensor
    seen: Tensor
    real: Tensor | None

    @property
    def causal(self) -> bool:
        """Whether no mask was made: query i sees the keys up to K - Q + i, and no others."""
        return isinstance(self.pairs, CausalMask)

    def block(self, rows: slice, queries: slice, keys: int) -> View:
        """Return the block of these rows of the batch and queries, over the first `keys` keys; of a
        causal view those up to the last that its queries see."""
        real = None if self.real is None else self.real[rows, queries]
        seen = self.seen[rows, queries]
        if self.causal:
            pairs: Tensor = CausalMask.of(len(seen), seen.shape[1], keys, seen.device)
        else:  # contiguous, so that compiled kernels see one layout only
            pairs = self.pairs[rows, :, queries, :keys].contiguous()
        return View(pairs, seen, real)

    @functools.cached_property
    def mask(self) -> Tensor:
        """The mask [B, 1, Q, K] bool."""
        return self.pairs.made() if isinstance(self.pairs, CausalMask) else self.pairs

    @functools.cached_property
    def bias(self) -> Tensor:
        """What is added to scores [B, 1, Q, K] float32: 0, or the lowest number where the mask forbids."""
        lowest = torch.finfo(torch.float32).min
        if not self.causal:
            return torch.where(self.mask, 0.0, lowest)
        batch, _, queries, keys = self.pairs.shape
        last = CausalMask.of(batch, queries, queries, self.pairs.device).made()
        return functional.pad(torch.where(last, 0.0, lowest), (keys - queries, 0))


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
    reach: Sequence[int]
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
        if self.view.pairs.numel() <= KEPT_PAIRS:
            self._kept[place] = view
        return view


@dataclass(eq=False)
class Current:
    """What a forward pass knows of its `length` new tokens: which are real, where some are pads, whether
    its cache keeps codes, and whether what was cached before it are codes. `shared`: values that modules
    read together, with what they were coded to and who has not read it yet."""

    real: Tensor | None = None
    length: int = 0
    keeps: bool = False
    kept: bool = False
    cache: Any = None
    shared: dict[Any, tuple[Tensor, Tensor, set[nn.Module]]] = field(default_factory=dict)
    visibility: dict[int, tuple[Tensor, Visibility]] = field(default_factory=dict)
    buffers: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict)


class ForwardState:
    """The current forward pass of every thread, for several may pass through one model at once."""

    def __init__(self) -> None:
        self._latest = Current()
        self._threads = threading.local()

    @property
    def now(self) -> Current:
        """The pass of this thread; of one that has begun none, as autograd's that computes a layer once
        more, the one that began last."""
        if torch.compiler.is_compiling():
            return self._latest
        own: Current = getattr(self._threads, "now", self._latest)
        return own

    def holds(self, module: nn.Module, key: Tensor) -> bool:
        """Whether the cache of this pass keeps codes, and the keys of an attention module are its own
        memory: those that are made anew of what is cached hold no codes."""
        now, index = self.now, getattr(module, "layer_idx", None)
        if not now.keeps or not isinstance(index, int) or index >= len(now.cache.layers):
            return False
        cached = now.cache.layers[index].keys
        if cached is None:  # this layer writes into no cache
            return False
        if cached is key:
            return True
        return bool(cached.untyped_storage().data_ptr() == key.untyped_storage().data_ptr())

    def begin(self, attention_mask: Tensor | None, length: int) -> None:
        """Start a pass of `length` new tokens; `attention_mask` [B, past + length] marks pads."""
        now = self._own()
        now.visibility.clear()
        now.shared.clear()
        now.real, now.length = None, length
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -length:].bool()
            now.real = None if bool(real.all()) else real

    def _own(self) -> Current:
        """That of this thread, which is the one that began last."""
        if torch.compiler.is_compiling():
            return self._latest
        if not hasattr(self._threads, "now"):
            self._threads.now = Current()
        self._latest = self._threads.now
        return self._latest

    def real_at(self, x: Tensor) -> Tensor | None:
        """Return which new tokens are real, where x is: layers may be spread over devices."""
        real = self.now.real
        return None if real is None else real.to(x.device)

    def visibility(self, mask: Tensor) -> Visibility:
        kept = self.now.visibility
        if id(mask) not in kept:
            kept[id(mask)] = (mask, _visibility(mask, self.real_at(mask)))
        return kept[id(mask)][1]

    def buffer(self, size: int, like: Tensor) -> Tensor:
        """Return memory of `size` values on the device and of the dtype of `like`, the same for every
        block: the pages of fresh memory cost more than the products that fill them."""
        key, kept = (like.device, like.dtype), self.now.buffers
        if key not in kept or len(kept[key]) < size:
            with torch.inference_mode(False):  # a later pass may run outside of that mode
                kept[key] = torch.empty(size, device=like.device, dtype=like.dtype)
        return kept[key][:size]


def _visibility(mask: Tensor, real: Tensor | None) -> Visibility:
    """mask [B, 1, Q, K] bool, real [B, Q] bool or None."""
    queries, keys = mask.shape[-2:]
    if isinstance(mask, CausalMask):
        if real is None and keys == queries:
            return _causal(mask)
        mask = mask.made()
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
    if real is None and not bool(last.any()):
        raise InputError(
            "by the mask of this pass no token sees any other, nor itself: it was lost on its way"
        )
    causal = keys == queries and bool((view.seen == place).all() & (last == place).all())
    return Visibility(view, watched, fresh, tuple(last.tolist()), causal)


def _causal(mask: CausalMask) -> Visibility:
    """What `_visibility` gives of the same mask [B, 1, S, S], by numbers alone."""
    batch, length = len(mask), mask.shape[-1]
    seen = torch.arange(1, length + 1, device=mask.device).expand(batch, -1)
    return Visibility(
        View(mask, seen, None), seen.flip(-1), None, range(1, length + 1), causal=True
    )
