"""What one window of text asks of a model, from its dimensions: products, element-wise steps, values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.analysis.operations import ELEMENTWISE, PRODUCTS, Operation, pairs_met
from stages.model.offload import OUTSIDE
from stages.model.sites import Site


@dataclass(frozen=True)
class Work:
    """`macs`: multiplications of all products; `elements`: numbers that element-wise steps make;
    `values`: numbers that pass the chosen sites."""

    macs: int
    elements: int
    values: int


def work(plan: Sequence[Operation], sites: Sequence[Site], length: int, logits: int = 0) -> Work:
    """Return the work of a window of `length` tokens, each of which sees those in front of it.

    `plan` is what `operations` lists. The head sees the last `logits` tokens, 0 for all.
    """
    chosen = {site.operand for site in sites}
    macs = elements = values = 0
    for operation in plan:
        head = operation.layer == OUTSIDE and operation.kind in ("linear", "gate")
        tokens = logits if head and logits else length
        pairs = pairs_met(length, length, "causal", operation.window, operation.prefix)
        amount = operation.work.at(tokens, pairs)
        if operation.kind in PRODUCTS:
            macs += amount
        elif operation.kind in ELEMENTWISE:
            elements += amount
        elif operation.kind == "gate" and chosen.intersection(operation.operands):
            values += amount
    return Work(macs, elements, values)
