"""Operations alone: every multiplication and every addition has a price, and memory has none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.profiles.base import Item, Profile

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Operations(Profile):
    """Counts of operations times what one costs, the model of most papers on spiking networks."""

    def items(self, work: pd.DataFrame) -> Iterator[Item]:
        yield from self.compute(work)
