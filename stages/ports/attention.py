"""Attention whose four operands pass through ports, by blocks of scores that stay in a cache.

Registered both as attention (`stages.ports.scores`) and as mask function: with the first alone
transformers builds no mask and the model silently stops being causal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from stages.errors import InputError
from stages.ports.port import SpikingPort
from stages.ports.visibility import CausalMask, ForwardState, View, Visibility

NAME = "ported"
QUERY_BLOCK = 64
# Blocks at once where a kernel's start costs more than its memory: on a GPU, and of spikes on a CPU.
WIDE, SPIKES = 4, 2
BLOCK_SCORES = 3 << 18  # on a CPU: of two cores, whose caches hold about that many
_PORTS = "attention_ports"


class Port(Protocol):
    """What a value passes on its way into a matmul.

    plain: whether it passes probabilities as they are without looking at them; whole: whether a block of
    probabilities must have all rows and heads.
    """

    plain: bool
    whole: bool

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
    query = ports.q(query, *seen.asked)
    held = ports.state.holds(module, key)
    old = key.shape[2] - queries if held and ports.state.now.kept else 0
    key = _cached(ports.k, key, seen, groups, held, old).transpose(2, 3)
    value = _cached(ports.v, value, seen, groups, held, old)
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
    elif queries == 1:
        output, spikes = _of_one_query(ports.probs, query, key, value, seen.view, scaling)
    else:
        output, spikes = _by_blocks(ports, query, key, value, seen, scaling)
    ports.probs.tally(spikes, seen.view, heads, width)
    return output if added is None else output + added.transpose(0, 1), None


def _cached(
    port: Port,
    x: Tensor,  # [B, G, K, D]
    seen: Visibility,
    groups: int,
    held: bool,
    old: int,
) -> Tensor:
    """The codes of keys or values, in their place where a cache that keeps codes holds x; of those
    behind the `old` alone, which are codes already."""
    if held and isinstance(port, SpikingPort) and port.keeps:
        port.keep(x, old)
        return x
    return port(x, *seen.marked(groups))


def _of_one_query(
    port: Port,
    query: Tensor,  # [B, H, 1, D]
    key: Tensor,  # [B, G, D, K]
    value: Tensor,  # [B, G, K, D]
    view: View,
    scaling: float,
) -> tuple[Tensor, Tensor | None]:
    """Attention [B, 1, H, D] of a token that is generated, as `_by_blocks` gives it."""
    batch, heads, _, width = query.shape
    groups, keys = key.shape[1], key.shape[3]
    asking = query.reshape(batch * groups, heads // groups, width)
    scores = _multiplied(asking, key.reshape(batch * groups, width, keys))
    scores = scores.view(batch, heads, 1, keys)
    if isinstance(port, SpikingPort) and _numbers(scores, value):
        output = query.new_empty(batch, 1, heads, width)
        done, spikes = port.attend(scores, scaling, view.bias, value, output)
        if done:
            return output, spikes
    probs, spikes = port.softmax(scores, scaling, view)
    given = value.reshape(batch * groups, keys, width)
    output = _multiplied(probs.view(batch * groups, -1, keys), given)
    return output.view(batch, 1, heads, width), spikes


def _multiplied(a: Tensor, b: Tensor) -> Tensor:
    """The products of two batches, which `torch.bmm` starts sooner where none is of spikes."""
    return torch.bmm(a, b) if _numbers(a, b) else torch.matmul(a, b)


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
    whole = query.device.type != "cpu" or ports.probs.whole
    wide = WIDE if whole else 1 if plain else SPIKES
    for rows, some, block in _blocks(batch, groups, share, seen.reach, wide):
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
        given, place = value[rows, some, :keys], output[rows, block, some]
        done, fired = False, None
        if isinstance(ports.probs, SpikingPort) and plain and not learns:
            bias = None if seen.causal else view.bias
            done, fired = ports.probs.attend(scores, scaling, bias, given, place.flatten(2, 3))
        if not done:
            probs, fired = ports.probs.softmax(scores, scaling, view)
            flat = probs.view(many * members, share * size, keys)
            part = torch.matmul(flat, given.reshape(many * members, keys, width))
            place.copy_(part.view(many, members, share, size, width).permute(0, 3, 1, 2, 4))
        if fired is not None:
            if spikes is None:
                spikes = fired.new_empty(batch, heads, queries)
            spikes[rows, some.start * share : some.stop * share, block] = fired
    return output.view(batch, queries, heads, width), spikes


def _blocks(
    batch: int, groups: int, share: int, reach: Sequence[int], wide: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of the batch, groups of heads and queries of every block of scores; all rows and heads of
    `wide` times the queries where that is more than one."""
    size = QUERY_BLOCK * wide
    for start in range(0, len(reach), size):
        block = slice(start, min(start + size, len(reach)))
        head = share * (block.stop - block.start) * max(1, *reach[block])
        rows = batch if wide > 1 else max(1, min(batch, BLOCK_SCORES // (groups * head)))
        some = groups if wide > 1 else max(1, min(groups, BLOCK_SCORES // head))
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


def ported_mask(**kwargs: Any) -> Tensor:
    """Return a boolean mask [B, 1, Q, K]; never None, which a lost mask would be, too.

    Where transformers leaves the mask of as many keys as queries to a kernel, it is a `CausalMask`.
    """
    batch, queries, keys = (kwargs[size] for size in ("batch_size", "q_length", "kv_length"))
    plain = queries == keys > 1 and not torch.compiler.is_compiling()
    skip = plain and kwargs.get("allow_is_causal_skip", True)
    skips = {"allow_is_causal_skip": skip, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(**{**kwargs, **skips})
    if mask is None:
        return CausalMask.of(batch, queries, keys, kwargs.get("device", "cpu"))
    return mask


AttentionMaskInterface.register(NAME, ported_mask)
