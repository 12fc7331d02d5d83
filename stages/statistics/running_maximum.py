"""The smoothed range of the paper's released code, over windows of calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.fits.statistics import RunningMaximum
from stages.model.experts import refuse_experts
from stages.model.shares import Part
from stages.model.sites import Site
from stages.statistics import Earlier, meter
from stages.statistics.streamed import Streamed
from stages.statistics.watch import Watch


@meter.register
def running_maximum(
    statistic: RunningMaximum,
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    earlier: Earlier,
) -> Streamed:
    """maximum [sites] over windows ids [W, S]."""
    refuse_experts(sites, "a running maximum", "use tau=maximum, or another coding")
    averages = [_Average(statistic.momentum, site.port == "probs") for site in sites]
    watches = {s.name: Watch(a.see) for s, a in zip(sites, averages, strict=True)}

    def tensors() -> dict[str, Tensor]:
        return {"maximum": torch.stack([average.maximum() for average in averages])}

    return Streamed(model, ids, statistic.name, watches, dict(enumerate(averages)), tensors)


class _Average:
    """The moving average of every channel's maximum of a window."""

    def __init__(self, momentum: float, probs: bool) -> None:
        self._momentum, self._probs = momentum, probs
        self._windows: Tensor | None = None  # [B, C], of the batch that is running
        self._channels: Tensor | None = None  # [C]

    def see(self, x: Tensor) -> None:
        """x [B, S, C] or [B, H, S, D]; probabilities [B, H, Q, K] come in blocks of queries."""
        top = x.amax((-2, -1)) if self._probs else x.abs().amax(-2).flatten(1)
        self._windows = top if self._windows is None else torch.maximum(self._windows, top)

    def take(self) -> Part:
        windows, self._windows = self._windows, None
        return {} if windows is None else {"maxima": windows}

    def merge(self, part: Part) -> None:
        """Take the windows of the batch in turn, so that its size changes nothing."""
        for row in part["maxima"].double():
            old = row if self._channels is None else self._channels
            self._channels = self._momentum * old + (1 - self._momentum) * row

    def maximum(self) -> Tensor:
        if self._channels is None:
            raise RuntimeError("a site was never reached by the forward pass")
        return self._channels.amax().float().cpu()
