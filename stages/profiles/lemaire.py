"""The model of Lemaire et al. 2022 (arXiv 2210.13107): arithmetic, addressing, and SRAM by its size.

Every use of a weight reads it, and every addition that a spike selects reads and writes a potential. The
equations are those of their section 3 for fully connected layers, in the reading of spikingjelly 2.0.0;
attention's products are such layers, whose weights are the keys and values in the cache. Other
operations have their arithmetic only; neurons have that of their code: decoding moves potentials, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.errors import InputError
from stages.profiles.base import Item, Profile, check, multiplied, products

if TYPE_CHECKING:
    import pandas as pd

WORD = 4  # bytes of a value, a weight, a potential, a message


@dataclass(frozen=True, kw_only=True)
class Lemaire(Profile):
    """`sram`: pairs of the bytes of a memory and the price of an access of a 32-bit word, linear between
    them, from nothing for no memory and not above the last. `queue`: messages that a layer's queue of
    spikes holds. `address`: an addition that finds a weight and a potential."""

    sram: Sequence[Sequence[float]]
    queue: int
    address: float

    def __post_init__(self) -> None:
        kinds = {"unit": "choice", "source": "text", "queue": "count"}
        pairs = [tuple(pair) for pair in self.sram]
        sizes = [pair[0] for pair in pairs if len(pair) == 2]
        rising = all(a < b for a, b in zip([0, *sizes], sizes, strict=False))
        if not pairs or len(sizes) < len(pairs) or not rising or min(p[1] for p in pairs) < 0:
            raise InputError(
                f"energy profile {self.name}: sram={self.sram!r}: give pairs [bytes, price] of rising "
                "bytes"
            )
        check(self, f"profile {self.name}", "sram", **kinds)

    def items(self, work: pd.DataFrame) -> Iterator[Item]:
        yield from self.compute(work)
        yield from self._moved(work[work["kind"] == "decode_scaling"])
        product = products(work)
        dense, spiking = multiplied(product), product["acs"]
        entering, leaving = product["inputs"] * dense, product["outputs"] * dense
        yield Item("weights", "read", product["macs"] + spiking, self._access(product["stored"]))
        into = self._access(product["inputs"] / product["rows"])
        yield Item("inputs", "read", entering, into)
        yield Item("inputs", "spike read", product["spikes"], self._access(self.queue))
        out = self._access(product["outputs"] / product["rows"])
        for event in ("read", "write"):
            yield Item("potentials", event, spiking, out)
        yield Item("outputs", "write", leaving, out)
        yield Item("addressing", "addition", spiking + entering + leaving, self.address)

    def _moved(self, decoded: pd.DataFrame) -> Iterator[Item]:
        """Decoding: each of its operations reads an accumulator and writes it again."""
        access = self._access(decoded["outputs"] / decoded["rows"])
        for event in ("read", "write"):
            yield Item("potentials", event, decoded["macs"] + decoded["acs"], access)

    def _access(self, values: pd.Series | float) -> pd.Series | float:
        """The price of a word of a memory of so many."""
        sizes, prices = zip((0.0, 0.0), *self.sram, strict=True)
        price = np.interp(WORD * np.asarray(values, dtype=float), sizes, prices)
        return float(price) if price.ndim == 0 else values * 0 + price
