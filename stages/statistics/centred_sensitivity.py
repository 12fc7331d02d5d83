"""The curvature of the loss by magnitude about the means of channels: a pass for these, then one backward
pass a window."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from stages.fits.sensitivity import CentredSensitivity
from stages.fits.statistics import CENTRED
from stages.model.sites import Site
from stages.statistics import measure
from stages.statistics.channel_scale import channel_means
from stages.statistics.sensitivity import by_magnitude


@measure.register
def centred_sensitivity(
    statistic: CentredSensitivity,
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    batch: int,
) -> dict[str, Tensor]:
    """What `sensitivity` has, by cell of |x - m| with the means that `channel_mean` measures, and as
    plain_total and plain_count [S, CELLS] by cell of |x|."""
    means = channel_means(model, ids, sites, batch, CENTRED)
    return by_magnitude(statistic, model, ids, sites, means)
