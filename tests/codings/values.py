"""The values of a model's sites, a channel a column."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.fits.statistics import CENTRED
from stages.model.sites import Site, find_sites
from stages.ports.hooks import stream
from stages.statistics.watch import Watch


def seen(model: PreTrainedModel, ids: Tensor, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Of every site but the probabilities and those of experts, [tokens, C]."""
    having = [site.name for site in sites if site.port != "probs" and site.expert is None]
    parts: dict[str, list[Tensor]] = {name: [] for name in having}

    def keep(name: str) -> Watch:
        return Watch(lambda x: parts[name].append(x.transpose(1, 2) if x.dim() == 4 else x))

    stream(model, ids, 2, {name: keep(name) for name in parts}, "values")
    return {n: torch.cat([x.reshape(-1, x[0, 0].numel()) for x in p]) for n, p in parts.items()}


def averages(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """The means of the channels of the sites that may be coded about them, [C]."""
    sites = find_sites(model)
    values = seen(model, ids, sites)
    return {s.name: values[s.name].mean(0) for s in sites if s.role in CENTRED and not s.expert}
