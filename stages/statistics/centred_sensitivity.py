"""The curvature of the loss by magnitude about the means of channels: one backward pass a window."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from stages.fits.sensitivity import CentredSensitivity
from stages.fits.statistics import CENTRED
from stages.model.sites import Site
from stages.statistics import Earlier, Meter, meter
from stages.statistics.sensitivity import Curvatures
from stages.statistics.watch import means_of


@meter.register
def centred_sensitivity(
    statistic: CentredSensitivity,
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    earlier: Earlier,
) -> Meter:
    """What `sensitivity` has, by cell of |x - m| with the means that `channel_means` measures, and as
    plain_total and plain_count [S, CELLS] by cell of |x|."""
    return Curvatures(statistic, model, ids, sites, means_of(earlier, sites, CENTRED))
