"""The scales of channels: a quantile of their magnitudes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.fits.statistics import ChannelScales
from stages.model.experts import refuse_experts
from stages.model.shares import Part
from stages.model.sites import Site
from stages.statistics import Earlier, meter
from stages.statistics.streamed import Streamed
from stages.statistics.watch import Watch, channel_rows, means_of, padded


@meter.register
def channel_scales(
    statistic: ChannelScales,
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    earlier: Earlier,
) -> Streamed:
    """scale [sites, C], filled up with 1, and channels [sites], their number."""
    refuse_experts(sites, "a scale of channels", "use coding.granularity=site")
    means = means_of(earlier, sites, statistic.roles)
    number = statistic.kept(ids.numel())
    tops = {i: _Largest(number, means[i]) for i, site in enumerate(sites) if site.port != "probs"}
    watches = {sites[i].name: Watch(top.see) for i, top in tops.items()}

    def tensors() -> dict[str, Tensor]:
        rows = [tops[i].scale() if i in tops else None for i in range(len(sites))]
        numbers = [0 if row is None else len(row) for row in rows]
        return {"scale": padded(rows, 1.0), "channels": torch.tensor(numbers).float()}

    return Streamed(model, ids, "scales of channels", watches, tops, tensors)


class _Largest:
    """The `number` largest magnitudes of every channel, of a batch and of all: [number, C], descending."""

    def __init__(self, number: int, mean: Tensor | None) -> None:
        self._number, self._mean = number, mean
        self._passing: Tensor | None = None
        self._top: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """x [B, S, C] or [B, H, S, D]."""
        rows = channel_rows(x).float()
        rows = (rows if self._mean is None else rows - self._mean.to(x.device)).abs()
        self._passing = self._largest(self._passing, rows)

    def _largest(self, top: Tensor | None, rows: Tensor) -> Tensor:
        rows = rows if top is None else torch.cat([top, rows])
        return rows.topk(min(self._number, len(rows)), 0).values

    def take(self) -> Part:
        top, self._passing = self._passing, None
        return {} if top is None else {"top": top}

    def merge(self, part: Part) -> None:
        self._top = self._largest(self._top, part["top"])

    def scale(self) -> Tensor:
        """The last of them, or what takes its place where it is zero, [C]."""
        if self._top is None:
            raise RuntimeError("a site was never reached by the forward pass")
        scale = torch.where(self._top[-1] > 0, self._top[-1], self._top[0])
        rest = scale.amax() if bool(scale.amax() > 0) else scale.new_ones(())
        return torch.where(scale > 0, scale, rest)
