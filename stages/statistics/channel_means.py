"""The means of channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.fits.statistics import CENTRED, ChannelMeans
from stages.model.shares import Part
from stages.model.sites import Site
from stages.statistics import Earlier, meter
from stages.statistics.streamed import Streamed
from stages.statistics.watch import Watch, channel_rows, padded


@meter.register
def channel_means(
    statistic: ChannelMeans,
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    earlier: Earlier,
) -> Streamed:
    """mean [sites, C], filled up with 0, and channels [sites], the number of those that have one."""
    means = {i: _Mean() for i, s in enumerate(sites) if s.role in CENTRED and s.expert is None}
    watches = {sites[i].name: Watch(mean.see) for i, mean in means.items()}

    def tensors() -> dict[str, Tensor]:
        rows = [means[i].mean() if i in means else None for i in range(len(sites))]
        numbers = [0 if row is None else len(row) for row in rows]
        return {"mean": padded(rows, 0.0), "channels": torch.tensor(numbers).float()}

    return Streamed(model, ids, "means of channels", watches, means, tensors)


class _Mean:
    """The mean of every channel: sums [C] float64 and numbers of rows, of a batch and of all."""

    def __init__(self) -> None:
        self._passing: Tensor | None = None
        self._rows = 0
        self._sum: Tensor | None = None
        self._number = 0

    def see(self, x: Tensor) -> None:
        """x [B, S, C] or [B, H, S, D]."""
        rows = channel_rows(x)
        total = rows.sum(0, dtype=torch.float64)
        self._passing = total if self._passing is None else self._passing + total
        self._rows += len(rows)

    def take(self) -> Part:
        if self._passing is None:
            return {}
        part = {"sum": self._passing, "number": torch.tensor(self._rows)}
        self._passing, self._rows = None, 0
        return part

    def merge(self, part: Part) -> None:
        self._sum = part["sum"] if self._sum is None else self._sum + part["sum"]
        self._number += int(part["number"])

    def mean(self) -> Tensor:
        if self._sum is None:
            raise RuntimeError("a site was never reached by the forward pass")
        return (self._sum / self._number).float()
