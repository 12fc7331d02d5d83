"""Measurements of the dense model on calibration text that some codings need beyond the distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.errors import InputError
from stages.model.experts import refuse_experts
from stages.model.sites import Site, find_sites
from stages.ports.attention import View
from stages.ports.hooks import stream
from stages.ports.port import DensePort
from stages.registry import register

See = Callable[[Tensor], None]


class Watch(DensePort):
    """Shows every value to each of `see`, and passes it on as it is."""

    def __init__(self, *see: See) -> None:
        super().__init__()
        self._see = see

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        for see in self._see:
            see(x)
        return x

    def softmax(self, scores: Tensor, scaling: float, view: View, fanout: int) -> Tensor:
        probs = super().softmax(scores, scaling, view, fanout)
        for see in self._see:
            see(probs)
        return probs


def padded(rows: Sequence[Tensor | None], rest: float) -> Tensor:
    """Rows of different lengths as one float32 tensor [rows, longest], filled up with `rest`."""
    longest = max((len(row) for row in rows if row is not None), default=1)
    table = torch.full((len(rows), longest), rest)
    for own, row in zip(table, rows, strict=True):
        if row is not None:
            own[: len(row)] = row.float().cpu()
    return table


# --- running maximum -------------------------------------------------------------------------------


@register("statistic/running_maximum", was="stages.llm.statistics.RunningMaximum")
@dataclass(frozen=True)
class RunningMaximum:
    """The smoothed range of the paper's released code: tau of a site is the maximum over channels of
    an exponential moving average, over windows, of the channel's largest |x| in a window.

    The first window starts the average; `momentum` is the share of the old one. A channel is a
    feature, in q, k and v a head's dimension, in the probabilities a head. Below the true maximum, so
    that a coding with this scale clips.
    """

    momentum: float = 0.99

    name = "running_maximum"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InputError(
                f"running maximum: momentum={self.momentum}: give a share from 0 to below 1"
            )

    def run(
        self, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
    ) -> dict[str, Tensor]:
        """maximum [sites] over windows ids [W, S]."""
        refuse_experts(sites, "a running maximum", "use tau=maximum, or another coding")
        averages = [_Average(self.momentum, site.port == "probs") for site in sites]
        watches = {s.name: Watch(a.see) for s, a in zip(sites, averages, strict=True)}

        def after() -> None:
            for average in averages:
                average.close()

        stream(model, ids, batch, watches, self.name, after)
        return {"maximum": torch.stack([average.maximum() for average in averages])}


class _Average:
    """The moving average of every channel's maximum of a window."""

    def __init__(self, momentum: float, probs: bool) -> None:
        self._momentum, self._probs = momentum, probs
        self._window: Tensor | None = None  # [B, C], of the batch that is running
        self._channels: Tensor | None = None  # [C]

    def see(self, x: Tensor) -> None:
        """x [B, S, C] or [B, H, S, D]; probabilities [B, H, Q, K] come in blocks of queries."""
        top = x.amax((-2, -1)) if self._probs else x.abs().amax(-2).flatten(1)
        self._window = top if self._window is None else torch.maximum(self._window, top)

    def close(self) -> None:
        """Takes the windows of the batch in turn, so that its size changes nothing."""
        if self._window is None:  # the batch has not come to this layer
            return
        for row in self._window.double():
            old = row if self._channels is None else self._channels
            self._channels = self._momentum * old + (1 - self._momentum) * row
        self._window = None

    def maximum(self) -> Tensor:
        if self._channels is None:
            raise RuntimeError("a site was never reached by the forward pass")
        return self._channels.amax().float().cpu()


# --- saliency --------------------------------------------------------------------------------------


@register("statistic/saliency", was="stages.llm.statistics.Saliency")
@dataclass(frozen=True)
class Saliency:
    """How much the channels of a site weigh in the product they enter (SpikeLLM, arXiv 2407.04752,
    "optimal brain spiking"): signed, a mean over tokens and windows.

    A linear site with input X [tokens, C] and the weights W [out, C] of all its consumers scores
    X o (X W^T W). K scores K o (K Q^T Q), with Q of all query heads that read the key head, and V
    scores V o (P^T P V) likewise; a channel is then a key head's dimension. Q^T Q is taken over the
    whole window without the causal mask. Sites that feed no product with weights, q and the
    probabilities have no score.
    """

    name = "saliency"

    def run(
        self, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
    ) -> dict[str, Tensor]:
        """score [sites, C], NaN where there is none; operand [sites]: 1 for k and v, else 0.

        Raises InputError where other modules than linear ones multiply a site.
        """
        modules: dict[str, Any] = dict(model.named_modules())
        linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
        odd = [site.name for site in sites if not linear.issuperset(site.consumers)]
        if odd:
            raise InputError(
                f"saliency is defined on linear modules, not on what multiplies {odd[0]}: use "
                "coding.salient_fraction=0, or another coding"
            )
        outputs = {site.layer: site for site in find_sites(model) if site.role == "attn.out"}
        layers: dict[str, _Operands] = {}
        sums: dict[str, _Sum] = {}
        sees: dict[str, list[See]] = {}
        for site in sites:
            linears = [modules[name] for name in site.consumers]
            operands = layers.setdefault(site.path, _Operands())
            if site.port == "k":
                sums[site.name] = operands.key
                sees.setdefault(f"{site.path}:q", []).append(operands.see_query)
                sees.setdefault(site.name, []).append(operands.see_key)
            elif site.port == "v":
                sums[site.name] = operands.value
                sees.setdefault(site.name, []).append(operands.see_value)
                sees.setdefault(outputs[site.layer].name, []).append(operands.see_output)
            elif linears:
                product = _Linear(linears)
                sums[site.name] = product.score
                sees.setdefault(site.name, []).append(product.see)
        watches = {name: Watch(*each) for name, each in sees.items()}
        stream(model, ids, batch, watches, self.name)
        rows = [sums[s.name].total if s.name in sums else None for s in sites]
        operand = torch.tensor([float(site.port in ("k", "v")) for site in sites])
        return {
            "score": padded([_mean(row, len(ids)) for row in rows], torch.nan),
            "operand": operand,
        }


def _mean(total: Tensor | None, windows: int) -> Tensor | None:
    return None if total is None else total / windows


@dataclass
class _Sum:
    """A sum over windows, [C] float64."""

    total: Tensor | None = None

    def add(self, part: Tensor) -> None:
        part = part.double()
        self.total = part if self.total is None else self.total + part


class _Linear:
    """Mean over tokens of X o (X W^T W), summed over windows."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self._linears, self.score = linears, _Sum()

    def see(self, x: Tensor) -> None:
        for window in x.float():  # one at a time: a vocabulary of outputs is wide
            back = torch.zeros_like(window)
            for linear in self._linears:
                w = linear.weight.float()
                back += (window @ w.T) @ w
            self.score.add((window * back).mean(0))


@dataclass
class _Operands:
    """Scores of one layer's K and V, from second moments only: the column sums of K o (K Q^T Q) are
    the diagonal of K^T K Q^T Q, and those of V o (P^T P V) are the column sums of (P V)^2."""

    key: _Sum = field(default_factory=_Sum)
    value: _Sum = field(default_factory=_Sum)
    _query: Tensor | None = None  # Q^T Q [B, H, D, D] of the pass
    _shape: tuple[int, int] = (0, 0)  # G, D

    def see_query(self, x: Tensor) -> None:
        q = x.float()
        self._query = q.transpose(-1, -2) @ q

    def see_key(self, x: Tensor) -> None:
        assert self._query is not None
        k = x.float()  # [B, G, S, D]
        own = k.transpose(-1, -2) @ k
        read = self._query.unflatten(1, (k.shape[1], -1)).sum(2)
        for window in (own * read).sum(-1).flatten(1) / k.shape[2]:
            self.key.add(window)

    def see_value(self, x: Tensor) -> None:
        self._shape = (x.shape[1], x.shape[3])

    def see_output(self, x: Tensor) -> None:
        """x [B, S, H * D] is P V, the heads that read one value head side by side."""
        groups, width = self._shape
        square = x.float().square().mean(1).view(len(x), groups, -1, width)
        for window in square.sum(2).flatten(1):
            self.value.add(window)
