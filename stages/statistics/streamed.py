"""The meter of statistics that add up what passes at every site of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from stages.model.shares import Part, Share, run_shares
from stages.ports.hooks import stream
from stages.statistics.watch import Watch


class Sum(Protocol):
    """What one site adds up."""

    def take(self) -> Part:
        """Return what has passed since this was last asked, and begin the next batch; nothing if
        nothing has."""

    def merge(self, part: Part) -> None:
        """Add the `take` of a batch; of all in their order the sum is that of one pass."""


@dataclass(frozen=True)
class Streamed:
    """A meter of `sums`, by the index of their site, that `watches`, by the name of theirs, fill;
    `tensors` makes of them what is measured."""

    model: PreTrainedModel
    ids: Tensor  # [W, S]
    name: str
    watches: Mapping[str, Watch]
    sums: Mapping[int, Sum]
    tensors: Callable[[], dict[str, Tensor]]

    def run(self, batch: int) -> None:
        def after() -> None:
            for each in self.sums.values():
                if part := each.take():
                    each.merge(part)

        stream(self.model, self.ids, batch, self.watches, self.name, after)

    def run_shares(self, shares: Iterable[Share]) -> None:
        def run(batches: Iterable[Tensor], after: Callable[[], None]) -> None:
            stream(self.model, batches, 0, self.watches, self.name, after)

        run_shares(self.model, shares, self._take, run)

    def merge(self, part: Part) -> None:
        of: dict[int, Part] = {}
        for name, value in part.items():
            index, _, field = name.partition(" ")
            of.setdefault(int(index), {})[field] = value
        for number, left in of.items():
            self.sums[number].merge(left)

    def _take(self) -> Part:
        return {
            f"{index} {field}": value.cpu()
            for index, each in self.sums.items()
            for field, value in each.take().items()
        }
