"""A port that shows the values of a site, and rows of different lengths as one tensor and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stages.fits.statistics import ChannelMeans
from stages.model.sites import Site
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


def unpadded(table: Mapping[str, Tensor], name: str) -> list[Tensor | None]:
    """The rows of a `padded` tensor beside the `channels` of each, None for those without."""
    pairs = zip(table[name], table["channels"].int().tolist(), strict=True)
    return [row[:number] if number else None for row, number in pairs]


def channel_rows(x: Tensor) -> Tensor:
    """A channel a column of x [B, S, C] or [B, H, S, D]."""
    return (x.transpose(1, 2).flatten(2) if x.dim() == 4 else x).flatten(0, 1)


def means_of(
    earlier: Mapping[str, Mapping[str, Tensor]], sites: Sequence[Site], roles: Sequence[str]
) -> list[Tensor | None]:
    """The means of the channels of every site that is of `roles` and has some, see `ChannelMeans`."""
    if not roles:
        return [None for _ in sites]
    means = unpadded(earlier[ChannelMeans.name], "mean")
    return [mean if s.role in roles else None for s, mean in zip(sites, means, strict=True)]
