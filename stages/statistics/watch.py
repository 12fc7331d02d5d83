"""A port that shows the values of a site, and rows of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.ports.port import DensePort
from stages.ports.visibility import View

See = Callable[[Tensor], None]


class Watch(DensePort):
    """Shows every value to each of `see`, and passes it on as it is."""

    plain = False

    def __init__(self, *see: See) -> None:
        super().__init__()
        self._see = see

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        for see in self._see:
            see(x)
        return x

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        probs, spikes = super().softmax(scores, scaling, view)
        for see in self._see:
            see(probs)
        return probs, spikes


def padded(rows: Sequence[Tensor | None], rest: float) -> Tensor:
    """Rows of different lengths as one float32 tensor [rows, longest], filled up with `rest`."""
    longest = max((len(row) for row in rows if row is not None), default=1)
    table = torch.full((len(rows), longest), rest)
    for filled, row in zip(table, rows, strict=True):
        if row is not None:
            filled[: len(row)] = row.float().cpu()
    return table
