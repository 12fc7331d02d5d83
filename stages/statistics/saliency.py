"""How much the channels of a site weigh in the product they enter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.errors import InputError
from stages.fits.statistics import Saliency
from stages.model.shares import Part
from stages.model.sites import Site, find_sites, linear, rows
from stages.statistics import Earlier, meter
from stages.statistics.streamed import Streamed
from stages.statistics.watch import See, Watch, padded


@meter.register
def saliency(
    statistic: Saliency,
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    earlier: Earlier,
) -> Streamed:
    """score [sites, C], NaN where there is none; operand [sites]: 1 for k and v, else 0.

    Raises InputError where other modules than linear ones multiply a site.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    odd = [s.name for s in sites if not all(linear(modules[name]) for name in s.consumers)]
    if odd:
        raise InputError(
            f"saliency is defined on linear modules, not on what multiplies {odd[0]}: use "
            "coding.salient_fraction=0, or another coding"
        )
    outputs = {site.layer: site for site in find_sites(model) if site.role == "attn.out"}
    layers: dict[str, _Operands] = {}
    means: dict[int, _Mean] = {}
    sees: dict[str, list[See]] = {}
    for index, site in enumerate(sites):
        linears = [modules[name] for name in site.consumers]
        operands = layers.setdefault(site.path, _Operands())
        if site.port == "k":
            means[index] = operands.key
            sees.setdefault(f"{site.path}:q", []).append(operands.see_query)
            sees.setdefault(site.name, []).append(operands.see_key)
        elif site.port == "v":
            means[index] = operands.value
            sees.setdefault(site.name, []).append(operands.see_value)
            sees.setdefault(outputs[site.layer].name, []).append(operands.see_output)
        elif linears:
            product = _Linear(linears)
            means[index] = product.score
            sees.setdefault(site.name, []).append(product.see)
    watches = {name: Watch(*each) for name, each in sees.items()}

    def tensors() -> dict[str, Tensor]:
        rows = [means[i].mean() if i in means else None for i in range(len(sites))]
        operand = torch.tensor([float(site.port in ("k", "v")) for site in sites])
        return {"score": padded(rows, torch.nan), "operand": operand}

    return Streamed(model, ids, statistic.name, watches, means, tensors)


class _Mean:
    """A mean over windows in their order, [C] float64, so that batches of any size have the same."""

    def __init__(self) -> None:
        self._passing: list[Tensor] = []  # [C] of every window of the batch that is running
        self._total: Tensor | None = None
        self._windows = 0

    def add(self, window: Tensor) -> None:
        self._passing.append(window)

    def take(self) -> Part:
        windows, self._passing = self._passing, []
        return {"score": torch.stack(windows)} if windows else {}

    def merge(self, part: Part) -> None:
        for window in part["score"].double():
            self._total = window if self._total is None else self._total + window
        self._windows += len(part["score"])

    def mean(self) -> Tensor | None:
        return None if self._total is None else self._total / self._windows


class _Linear:
    """Mean over tokens of X o (X W^T W), by window."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self._linears, self.score = linears, _Mean()

    def see(self, x: Tensor) -> None:
        for window in x.float():  # one at a time: a vocabulary of outputs is wide
            back = torch.zeros_like(window)
            for module in self._linears:
                w = rows(module).float()
                back += (window @ w.T) @ w
            self.score.add((window * back).mean(0))


@dataclass
class _Operands:
    """Scores of one layer's K and V, from second moments only: the column sums of K o (K Q^T Q) are
    the diagonal of K^T K Q^T Q, and those of V o (P^T P V) are the column sums of (P V)^2."""

    key: _Mean = field(default_factory=_Mean)
    value: _Mean = field(default_factory=_Mean)
    _query: Tensor | None = None  # Q^T Q [B, H, D, D] of the pass
    _shape: tuple[int, int] = (0, 0)  # G, D

    def see_query(self, x: Tensor) -> None:
        q = x.float()
        self._query = q.transpose(-1, -2) @ q

    def see_key(self, x: Tensor) -> None:
        assert self._query is not None
        k = x.float()  # [B, G, S, D]
        keys = k.transpose(-1, -2) @ k
        read = self._query.unflatten(1, (k.shape[1], -1)).sum(2)
        for window in (keys * read).sum(-1).flatten(1) / k.shape[2]:
            self.key.add(window)

    def see_value(self, x: Tensor) -> None:
        self._shape = (x.shape[1], x.shape[3])

    def see_output(self, x: Tensor) -> None:
        """x [B, S, H * D] is P V, the heads that read one value head side by side."""
        groups, width = self._shape
        square = x.float().square().mean(1).view(len(x), groups, -1, width)
        for window in square.sum(2).flatten(1):
            self.value.add(window)
