"""The size of the products that the values of every site enter."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.analysis.operations import PRODUCTS, operations, pairs_met
from stages.fits.statistics import Products
from stages.model.sites import Site, find_sites
from stages.statistics import measure


@measure.register
def products(
    statistic: Products, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
) -> dict[str, Tensor]:
    """macs, accumulators [S] float64 a token of windows ids [W, S]; nothing runs. A token meets some of
    the experts of a layer, of which each has an equal share."""
    tokens, every = ids.shape[1], find_sites(model)
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    for operation in operations(model, every):
        if operation.kind not in PRODUCTS:
            continue
        pairs = pairs_met(tokens, tokens, "causal", operation.window, operation.prefix)
        amounts = operation.work.at(tokens, pairs), operation.outputs.at(tokens, pairs)
        for operand in operation.operands:
            sums[operand] += torch.tensor(amounts, dtype=torch.float64) / tokens
    sharing = Counter(site.operand for site in every)
    rows = torch.stack([sums[site.operand] / sharing[site.operand] for site in sites])
    macs, accumulators = rows.unbind(-1)
    return {"macs": macs.contiguous(), "accumulators": accumulators.contiguous()}
