"""A scalar quantiser with free levels: the bounds, which no neuron reaches by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.neurons.spikes import Params


def level_params(levels: Tensor) -> dict[str, Tensor]:
    """Parameters of the quantiser to the nearest of levels [sites, L], for `table_quantise`."""
    levels = levels.sort(-1).values.float()
    return {"levels": levels, "thresholds": (levels[..., 1:] + levels[..., :-1]) / 2}


def table_quantise(x: Tensor, p: Params) -> Tensor:
    """Nearest level, sign kept: thresholds [*S, L-1] ascending, levels [*S, L] ascending."""
    magnitude = x.float().abs()
    if p["levels"].dim() == 1:
        index = torch.bucketize(magnitude, p["thresholds"], right=True)
        level = p["levels"][index]
    else:
        index = torch.searchsorted(p["thresholds"], magnitude, right=True)
        level = torch.gather(p["levels"], -1, index)
    return torch.sign(x).float() * level
