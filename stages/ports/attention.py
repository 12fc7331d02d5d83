"""Attention whose four operands pass through ports, block by block over the queries.

Registered both as attention and as mask function: with the first alone transformers builds no mask
and the model silently stops being causal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from stages.errors import InputError

NAME = "ported"
QUERY_BLOCK = 256
_PORTS = "attention_ports"


class Port(Protocol):
    """What a value passes on its way into a matmul."""

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        """Pass x [..., C]; `real` marks the rows [...] that are new, real tokens (None: all);
        `fanout` is the number of multiplications each value of a row enters."""

    def constant(self, x: Tensor) -> Tensor | None:
        """Return what heads x [B, H, S, D] lack behind the port, the same of every token, [H, 1, D]."""

    def softmax(self, scores: Tensor, scaling: float, view: View, fanout: int) -> Tensor:
        """Compute attention probabilities of scores [B, H, Q, K], zero where `view.mask` forbids."""


@dataclass(frozen=True)
class View:
    """Who sees whom in a block of queries.

    mask [B, 1, Q, K] bool, seen [B, Q]: keys seen by each query, real [B, Q] bool or None (all).
    """

    mask: Tensor
    seen: Tensor
    real: Tensor | None

    def block(self, start: int, keys: int) -> View:
        """Return the block of queries from `start` on, which reads `keys` keys."""
        stop = start + QUERY_BLOCK
        real = None if self.real is None else self.real[:, start:stop]
        # Contiguous, so that compiled kernels see one layout only.
        mask = self.mask[:, :, start:stop, :keys].contiguous()
        return View(mask, self.seen[:, start:stop], real)


@dataclass(frozen=True)
class Visibility:
    """A view with what is derived from it once per forward pass.

    watched [B, K]: real queries that see each key; fresh [B, K]: keys of this pass that are real;
    blocks: the view of every query block, over the leading keys that some query of it may see.
    """

    view: View
    watched: Tensor
    fresh: Tensor | None
    blocks: tuple[View, ...]


class ForwardState:
    """What the current forward pass knows of its tokens: pads, and who sees whom."""

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self._visibility: dict[int, tuple[Tensor, Visibility]] = {}

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


def _visibility(mask: Tensor, real: Tensor | None) -> Visibility:
    """mask [B, 1, Q, K] bool, real [B, Q] bool or None."""
    seeing = mask[:, 0] if real is None else mask[:, 0] & real[:, :, None]
    queries, keys = mask.shape[-2:]
    fresh = None
    if real is not None or keys != queries:
        new = torch.ones(mask.shape[0], queries, dtype=torch.bool, device=mask.device)
        fresh = nn.functional.pad(new if real is None else real, (keys - queries, 0))
    any_key = mask.any(0)[0]  # [Q, K]
    last = (any_key * torch.arange(1, keys + 1, device=mask.device)).amax(-1).tolist()
    # A block reads every key up to the last one that any of its queries sees. Rows that see nothing
    # (left pads) get their uniform softmax over those keys, and nobody reads them.
    reach = tuple(max(1, max(last[q : q + QUERY_BLOCK])) for q in range(0, queries, QUERY_BLOCK))
    view = View(mask, mask[:, 0].sum(-1), real)
    blocks = (view.block(i * QUERY_BLOCK, size) for i, size in enumerate(reach))
    return Visibility(view, seeing.sum(-2), fresh, tuple(blocks))


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
    shape = (batch, key.shape[1], groups, queries, -1)
    output = query.new_empty(batch, queries, heads, width)
    for index, view in enumerate(seen.blocks):
        size, keys = view.mask.shape[-2:]
        start, stop = index * QUERY_BLOCK, index * QUERY_BLOCK + size

        def queries_of(x: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return x.view(shape)[:, :, :, start:stop].reshape(batch, key.shape[1], -1, x.shape[-1])

        def rows_of(x: Tensor) -> Tensor:
            return x.view(batch, key.shape[1], -1, x.shape[-1])

        scores = torch.matmul(queries_of(query), key[..., :keys])
        scores = scores.view(batch, heads, size, keys)
        probs = ports.probs.softmax(scores, scaling, view, width)
        block = torch.matmul(rows_of(probs), value[:, :, :keys]).view(batch, heads, size, width)
        block = block if added is None else block + added
        output[:, start:stop] = block.transpose(1, 2)
    return output, None


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
