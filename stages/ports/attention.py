"""Attention whose four operands pass through ports, by blocks of scores that stay in a cache.

Registered both as attention and as mask function: with the first alone transformers builds no mask
and the model silently stops being causal.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from stages.errors import InputError

NAME = "ported"
QUERY_BLOCK = 64
# Rows of a block where a kernel's start costs more than its memory: on a GPU, and of spikes.
WIDE = 4
BLOCK_SCORES = 3 << 18  # on a CPU: of two cores, whose caches hold about that many
MASK_ROWS = 256
KEPT_PAIRS = 1 << 23  # of a pass whose blocks are kept from layer to layer
_PORTS = "attention_ports"


class Port(Protocol):
    """What a value passes on its way into a matmul.

    plain: whether it passes probabilities as they are without looking at them.
    """

    plain: bool

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        """Pass x [..., C]; `real` marks the rows [...] that are new, real tokens (None: all);
        `fanout` is the number of multiplications each value of a row enters."""

    def constant(self, x: Tensor) -> Tensor | None:
        """Return what heads x [B, H, S, D] lack behind the port, the same of every token, [H, 1, D]."""

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        """Compute attention probabilities of scores [B, H, Q, K], zero where `view.mask` forbids, and
        the spikes of every row [B, H, Q] where they are counted; may overwrite the scores."""

    def tally(self, spikes: Tensor | None, view: View, heads: int, fanout: int) -> None:
        """Count the probabilities of a pass, whose rows have `spikes` [B, H, Q]."""


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
    _kept: dict[tuple[int, int], View] = field(default_factory=dict)

    def block(self, rows: slice, queries: slice, keys: int) -> View:
        """Return a block of the view; small ones are the same for every layer."""
        place = rows.start, queries.start
        if place in self._kept:
            return self._kept[place]
        view = self.view.block(rows, queries, keys)
        if self.view.mask.numel() <= KEPT_PAIRS:
            self._kept[place] = view
        return view


class ForwardState:
    """What the current forward pass knows of its tokens: pads, and who sees whom."""

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self._visibility: dict[int, tuple[Tensor, Visibility]] = {}
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def begin(self, attention_mask: Tensor | None, length: int) -> None:
        """Start a pass of `length` new tokens; `attention_mask` [B, past + length] marks pads."""
        self._visibility.clear()
        self.real = None
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -length:].bool()
            self.real = None if bool(real.all()) else real

    def visibility(self, mask: Tensor) -> Visibility:
        if id(mask) not in self._visibility:
            self._visibility[id(mask)] = (mask, _visibility(mask, self.real))
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


@dataclass(frozen=True)
class AttentionPorts:
    """The four ports of one attention module, and the state of the pass."""

    q: Port
    k: Port
    v: Port
    probs: Port
    state: ForwardState


def set_ports(module: nn.Module, ports: AttentionPorts | None) -> None:
    """Bind ports to an attention module, or take them off."""
    if ports is None:
        module.__dict__.pop(_PORTS, None)
    else:
        module.__dict__[_PORTS] = ports


def ported_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, G, K, D]
    value: Tensor,  # [B, G, K, D]
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute scaled dot-product attention over grouped heads, q, k, v and the probabilities ported.

    Probabilities sum to one, so what v lacks is added once to what attention gives; what k lacks shifts
    all scores of a query alike, and is left out.
    """
    _refuse(attention_mask, dropout, kwargs)
    assert attention_mask is not None
    ports: AttentionPorts = module.__dict__[_PORTS]
    seen = ports.state.visibility(attention_mask)
    batch, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    rows = seen.view.real
    real = None if rows is None else rows[:, None]
    fresh = None if seen.fresh is None else seen.fresh[:, None]
    reads = seen.view.seen if rows is None else seen.view.seen * rows
    query = ports.q(query, real, reads[:, None])
    key = ports.k(key, fresh, seen.watched[:, None] * groups).transpose(2, 3)
    value = ports.v(value, fresh, seen.watched[:, None] * groups)
    lacking = ports.v.constant(value)
    added = None if lacking is None else lacking.repeat_interleave(groups, 0)  # [H, 1, D]
    if ports.probs.plain and _numbers(query, key, value):
        spikes = None
        output = functional.scaled_dot_product_attention(
            query,
            key.transpose(2, 3),
            value,
            None if seen.causal else attention_mask,
            is_causal=seen.causal,
            scale=scaling,
            enable_gqa=groups > 1,
        ).transpose(1, 2)
    else:
        output, spikes = _by_blocks(ports, query, key, value, seen, scaling)
    ports.probs.tally(spikes, seen.view, heads, width)
    return output if added is None else output + added.transpose(0, 1), None


def _by_blocks(
    ports: AttentionPorts,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, G, D, K]
    value: Tensor,  # [B, G, K, D]
    seen: Visibility,
    scaling: float,
) -> tuple[Tensor, Tensor | None]:
    """Attention [B, Q, H, D], and the spikes of its probabilities [B, H, Q] where they are counted."""
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    share = heads // groups
    grouped = query.view(batch, groups, share, queries, width)
    output = query.new_empty(batch, queries, groups, share, width)
    spikes: Tensor | None = None
    plain = _numbers(query, key, value)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    for rows, some, block in _blocks(batch, groups, share, seen.reach, query.device, plain):
        keys = max(1, *seen.reach[block])
        view = seen.block(rows, block, keys)
        asking = grouped[rows, some, :, block]
        many, members, _, size, _ = asking.shape
        asking = asking.reshape(many * members, share * size, width)
        asked = key[rows, some, :, :keys].reshape(many * members, width, keys)
        if plain and not learns:
            space = ports.state.buffer(asking.shape[0] * asking.shape[1] * keys, query)
            scores = torch.bmm(asking, asked, out=space.view(*asking.shape[:2], keys))
        else:
            scores = torch.matmul(asking, asked)
        scores = scores.view(many, members * share, size, keys)
        probs, fired = ports.probs.softmax(scores, scaling, view)
        given = value[rows, some, :keys].reshape(many * members, keys, width)
        part = torch.matmul(probs.view(many * members, share * size, keys), given)
        output[rows, block, some] = part.view(many, members, share, size, width).permute(
            0, 3, 1, 2, 4
        )
        if fired is not None:
            if spikes is None:
                spikes = fired.new_empty(batch, heads, queries)
            spikes[rows, some.start * share : some.stop * share, block] = fired
    return output.view(batch, queries, heads, width), spikes


def _blocks(
    batch: int, groups: int, share: int, reach: Sequence[int], device: torch.device, plain: bool
) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of the batch, groups of heads and queries of every block of scores."""
    wide = device.type != "cpu" or not plain
    size = QUERY_BLOCK * (WIDE if wide else 1)
    for start in range(0, len(reach), size):
        block = slice(start, min(start + size, len(reach)))
        head = share * (block.stop - block.start) * max(1, *reach[block])
        rows = batch if wide else max(1, min(batch, BLOCK_SCORES // (groups * head)))
        some = groups if wide else max(1, min(groups, BLOCK_SCORES // head))
        for row in range(0, batch, rows):
            for group in range(0, groups, some):
                yield (
                    slice(row, min(row + rows, batch)),
                    slice(group, min(group + some, groups)),
                    block,
                )


def _numbers(*values: Tensor) -> bool:
    """Whether all values are numbers, none of them spikes."""
    return all(type(x) is Tensor for x in values)


def _refuse(mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise InputError(
            f"attention dropout of {dropout} would leave out spikes: call model.eval() before a pass"
        )
    extras = [n for n in ("softcap", "s_aux") if kwargs.get(n) is not None]
    if mask is None or mask.dtype != torch.bool or extras:
        raise NotImplementedError(
            "ported attention needs a boolean mask and a plain softmax; got "
            f"mask={None if mask is None else mask.dtype}, extras={extras}"
        )


def ported_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return a boolean mask [B, 1, Q, K] that is always built, never left to a kernel's causal flag."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(NAME, ported_attention)
AttentionMaskInterface.register(NAME, ported_mask)
