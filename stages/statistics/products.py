"""The size of the products that the values of every site enter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.analysis.operations import PRODUCTS, operations
from stages.fits.statistics import Products
from stages.model.sites import Site, find_sites
from stages.statistics import measure


@measure.register
def products(
    statistic: Products, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
) -> dict[str, Tensor]:
    """macs, accumulators [S] float64 a token of windows ids [W, S]; nothing runs."""
    tokens = ids.shape[1]
    names = {site.operand: index for index, site in enumerate(sites)}
    sums = torch.zeros(2, len(sites), dtype=torch.float64)
    for operation in operations(model, find_sites(model)):
        if operation.kind not in PRODUCTS:
            continue
        seen = range(operation.prefix + 1, operation.prefix + tokens + 1)
        pairs = sum(min(keys, operation.window or keys) for keys in seen)
        for operand in operation.operands:
            if operand in names:
                sums[0, names[operand]] += operation.work.at(tokens, pairs) / tokens
                sums[1, names[operand]] += operation.outputs.at(tokens, pairs) / tokens
    macs, accumulators = sums
    return {"macs": macs, "accumulators": accumulators}
