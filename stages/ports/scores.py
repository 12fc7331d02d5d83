"""What stands between scores and softmax: a soft-cap, a bias of keys (ALiBi), a sink.

The products of attention are those of `ported_attention`; these are ports around those of the
probabilities, which is given changed scores, and of values that are narrower than queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from stages.errors import InputError
from stages.ports.attention import _PORTS, NAME, AttentionPorts, Port, ported_attention
from stages.ports.visibility import View

# Tensors that transformers hands to attention and that change no score: the mask says what they do, or
# they are meant for the loss.
UNREAD = {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"}
UNREAD |= {"num_items_in_batch", "shift_labels"}


def capped(scores: Tensor, cap: float) -> Tensor:
    """Compute cap · tanh(scores / cap): Gemma 2's soft-cap."""
    return cap * torch.tanh(scores / cap)


def outside_sink(scores: Tensor, sink: Tensor, mask: Tensor) -> Tensor:
    """Return the share of the softmax that a sink leaves to the keys, [B, H, Q, 1].

    scores [B, H, Q, K], sink [H]: e^sink is one more term of the softmax's sum, of which no value is
    read (gpt-oss). mask [B, 1, Q, K].
    """
    lowest = torch.finfo(torch.float32).min
    total = torch.where(mask, scores.float(), lowest).logsumexp(-1, keepdim=True)
    return torch.sigmoid(total - sink.float()[:, None, None])


@dataclass
class ScoredPort:
    """The port of probabilities, behind what is done to scores; `left` is what sinks leave of every
    block of queries."""

    probs: Port
    cap: float | None = None
    bias: Tensor | None = None  # [B, H, 1, K], added to scaled scores
    sink: Tensor | None = None
    width: int | None = None  # of values, where it is not that of queries
    left: list[Tensor] = field(default_factory=list)

    plain = False
    whole = True  # biases, sinks and what they leave are those of all rows and heads

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        return self.probs(x, real, fanout)

    def constant(self, x: Tensor) -> Tensor | None:
        return self.probs.constant(x)

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        """Compute the probabilities of changed scores; the softmax is that of the port within."""
        changed = scores.float() * scaling
        if self.cap is not None:
            changed = capped(changed, self.cap)
        if self.bias is not None:
            changed = changed + self.bias[..., : scores.shape[-1]]
        if self.sink is not None:
            self.left.append(outside_sink(changed, self.sink, view.mask))
        return self.probs.softmax(changed.to(scores.dtype), 1.0, view)

    def tally(self, spikes: Tensor | None, view: View, heads: int, fanout: int) -> None:
        self.probs.tally(spikes, view, heads, fanout if self.width is None else self.width)


@dataclass
class PaddedPort:
    """The port of values of `width`, with zeros behind them that no product counts."""

    values: Port
    width: int
    zeros: int

    plain = whole = False

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        return nn.functional.pad(self.values(x, real, fanout), (0, self.zeros))

    def constant(self, x: Tensor) -> Tensor | None:
        lacking = self.values.constant(x[..., : self.width])
        return None if lacking is None else nn.functional.pad(lacking, (0, self.zeros))

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        return self.values.softmax(scores, scaling, view)

    def tally(self, spikes: Tensor | None, view: View, heads: int, fanout: int) -> None:
        self.values.tally(spikes, view, heads, fanout)


def scored_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,  # [B, G, K, D]
    value: Tensor,  # [B, G, K, D]
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [H]
    bias: Tensor | None = None,  # [B, H, 1, K]
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute ported attention with a soft-cap, sinks or a bias of keys where they are given.

    Behind a sink the probabilities of the keys sum up to less than one: they are coded as if they did,
    and what attention gives is multiplied by the rest, one number a query and head.
    """
    unknown = [n for n, v in kwargs.items() if isinstance(v, (Tensor, float)) and n not in UNREAD]
    if unknown:
        raise InputError(
            f"{type(module).__name__} gives attention {', '.join(unknown)}, which neurons' attention does "
            "not compute (it has a soft-cap, sinks and a bias of keys): this model cannot be converted"
        )
    plain = (module, query, key, value, attention_mask, scaling, dropout)
    narrower = query.shape[-1] - value.shape[-1]
    if softcap is None and s_aux is None and bias is None and not narrower:
        return ported_attention(*plain)
    ports: AttentionPorts = module.__dict__[_PORTS]
    _check(module, ports, key, narrower, softcap is not None or s_aux is not None)
    width = value.shape[-1]
    scored = ScoredPort(ports.probs, softcap, bias, s_aux, width)
    padded = PaddedPort(ports.v, width, narrower) if narrower else ports.v
    module.__dict__[_PORTS] = replace(ports, probs=scored, v=padded)
    try:
        output, _ = ported_attention(*plain)
    finally:
        module.__dict__[_PORTS] = ports
    output = output[..., :width]
    if s_aux is not None:  # the share of every query [B, H, Q, 1], for output [B, Q, H, D]
        output = output * torch.cat(scored.left, 2).transpose(1, 2).to(output.dtype)
    return output, None


def _check(
    module: nn.Module, ports: AttentionPorts, key: Tensor, narrower: int, shifts: bool
) -> None:
    """Refuse values wider than queries, and keys without their means where softmax sees a shift."""
    if narrower < 0:
        raise InputError(
            f"{type(module).__name__} has values wider than its queries, which neurons' attention does "
            "not compute: this model cannot be converted"
        )
    if shifts and ports.k.constant(key) is not None:
        raise InputError(
            f"{type(module).__name__} has a soft-cap or a sink, which sees the mean of keys that their "
            "code leaves out: use coding.centre=none"
        )


AttentionInterface.register(NAME, scored_attention)
