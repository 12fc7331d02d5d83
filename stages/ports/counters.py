"""Counters per site, summed on the device in float64 without a synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.fitted import Conversion
from stages.model.sites import Site

if TYPE_CHECKING:
    import pandas as pd

DECODING = ("decode_macs", "decode_acs", "comparisons", "steps")  # columns of what the code costs
FIELDS = ("values", "spikes", "macs", "acs", "error", "power", "nonzero")
NO_ROWS = ("attn.q", "attn.k", "attn.v", "attn.probs")  # of products without weights


class Counters:
    """Sums over real tokens: values coded, spikes, multiplications (macs) and spike-driven
    additions (acs) they enter, squared error and power of the code, and values that are not zero
    (nonzero) where there are no spikes and no product of attention."""

    def __init__(self, sites: Sequence[Site], device: torch.device | str) -> None:
        self.sites = tuple(sites)
        self.sums = torch.zeros(len(sites), len(FIELDS), dtype=torch.float64, device=device)
        self._closed = torch.zeros_like(self.sums)

    def close(self) -> None:
        """End a batch: its sums, added up by themselves, are one term each of those of all batches."""
        self._closed += self.sums
        self.sums.zero_()

    def take(self) -> Tensor:
        """Return the sums [sites, fields] of the batch that has passed, on the CPU, and begin the next."""
        part = self.sums.to("cpu", copy=True)
        self.sums.zero_()
        return part

    def merge(self, part: Tensor) -> None:
        """Add what `take` has given of a batch; of all in their order the sums are those of one pass."""
        self._closed += part.to(self._closed.device)

    def frame(self, coded: set[str]) -> pd.DataFrame:
        """Return one row a site; spikes and acs of sites that are not coded are missing, not zero, and so
        is nonzero where it is not counted."""
        import pandas as pd

        sums = self._closed + self.sums
        frame = pd.DataFrame(sums.cpu().numpy(), columns=list(FIELDS))
        frame.insert(0, "site", [site.name for site in self.sites])
        frame.insert(1, "role", [site.role for site in self.sites])
        frame.insert(2, "layer", [site.layer for site in self.sites])
        silent = ~frame["site"].isin(coded)
        frame.loc[silent, ["spikes", "acs", "error"]] = float("nan")
        frame.loc[~silent | frame["role"].isin(NO_ROWS), "nonzero"] = float("nan")
        return frame

    def of(self, conversion: Conversion | None) -> pd.DataFrame:
        """Return the frame of a model with these neurons and what decoding them costs, see `Decoding`:
        columns decode_macs, decode_acs, comparisons, steps.

        A bound quantises but does not spike; it and the dense model have no coded sites. Integers have
        no spikes either, but something to decode.
        """
        if conversion is None or not (conversion.coding.neuron or conversion.coding.operand_bits):
            return self.frame(set()).assign(**dict.fromkeys(DECODING, float("nan")))
        costs = decoding(conversion)
        spiking = conversion.neurons.sites if conversion.coding.neuron else ()
        frame = self.frame(set(spiking))
        return frame.join(costs, on="site")


def decoding(conversion: Conversion) -> pd.DataFrame:
    """What decoding costs at every site of a conversion, the columns of `Counters.of` by site."""
    import pandas as pd

    costs = conversion.coding.decoding(conversion.neurons.fit.params)
    columns = (costs.macs, costs.acs, costs.comparisons, costs.steps)
    table = {name: t.cpu().numpy() for name, t in zip(DECODING, columns, strict=True)}
    return pd.DataFrame(table, list(conversion.neurons.sites))


class SiteCounter:
    """The row of one site in the counters."""

    def __init__(self, counters: Counters, index: int) -> None:
        self._row = counters.sums[index]

    def add(
        self,
        shape: torch.Size,
        spikes: Tensor | None,
        real: Tensor | None,
        fanout: Tensor | int,
        values: Tensor | None = None,
    ) -> None:
        """Count rows of shape [..., C].

        spikes [...]: spikes of every row, None where the site is dense; real [...] bool: rows that
        are new, real tokens (None: all); fanout: multiplications each value of a row enters, zero
        where it is read by no real query; values: number of values where it is not C a row.
        """
        rows, width = shape[:-1], shape[-1]
        number = rows.numel() if real is None else real.expand(rows).sum()
        self._add(0, number * width if values is None else values)
        if isinstance(fanout, int):
            self._add(2, (number * width if values is None else values) * fanout)
        else:
            self._add(2, fanout.expand(rows).sum(dtype=torch.float64) * width)
        if spikes is None:
            return
        spikes = spikes.view(rows).double()
        counted = spikes if real is None else spikes * real
        total = counted.sum()
        self._add(1, total)
        if isinstance(fanout, int):
            self._add(3, total * fanout)
        else:
            self._add(3, (spikes * fanout).sum())

    def add_error(self, error: Tensor, power: Tensor) -> None:
        """Add sums of squared error and of squared values."""
        self._add(4, error)
        self._add(5, power)

    def add_nonzero(self, x: Tensor, real: Tensor | None) -> None:
        """Count the values of x [..., C] that are not zero, of the rows that are `real` [...]."""
        number = x.count_nonzero(-1)
        self._add(6, (number if real is None else number * real).sum())

    def _add(self, field: int, amount: Tensor | float) -> None:
        """Layers that accelerate has spread over devices count where the sums are."""
        here = self._row.device
        self._row[field] += amount.to(here) if isinstance(amount, Tensor) else amount
