"""Stage 4: measures what the fitted neurons do to live activations of the dense model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.errors import InputError
from stages.fitted import Conversion
from stages.model.offload import device_of
from stages.model.shares import Part, Parts, Share, run_shares
from stages.model.sites import Site, find_sites
from stages.ports.counters import Counters, SiteCounter

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from stages.ports.port import ErrorPort


@dataclass(frozen=True)
class Patching:
    """`windows` held-out calibration windows measure what each fitted neuron does to live values."""

    windows: int = 2

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise InputError(f"patching.windows={self.windows}: give at least 1")

    def run(
        self, model: PreTrainedModel, ids: Tensor, conversion: Conversion, batch: int
    ) -> pd.DataFrame:
        """Measure error and spikes of every converted site on the dense model's values over ids [W, S].

        One row a site: site, role, layer, values, spikes, nmse, nmse_atoms, bound_db, where nmse is
        sum (SN(x) - x)^2 / sum x^2 over live values that the fit has not seen, and the last two are
        those of the fit.
        """
        from stages.ports.hooks import stream  # takes seconds to import what it needs

        counters = Counters(_converted(model, conversion), device_of(model))
        ports = _ports(model, conversion, counters)
        stream(model, ids, batch, ports, "patching", after=counters.close)
        return _frame(counters, conversion)

    def run_shares(
        self, model: PreTrainedModel, shares: Iterable[Share], conversion: Conversion
    ) -> None:
        """Measure batches by themselves; `merged` makes of their parts what `run` makes."""
        from stages.ports.hooks import stream  # likewise

        counters = Counters(_converted(model, conversion), device_of(model))
        ports = _ports(model, conversion, counters)

        def take() -> Part:
            return {"sums": counters.take()}

        run_shares(
            model,
            shares,
            take,
            lambda batches, after: stream(model, batches, 0, ports, "patching", after=after),
        )

    def merged(self, model: PreTrainedModel, conversion: Conversion, parts: Parts) -> pd.DataFrame:
        """The rows of `run`, of what all batches have left."""
        counters = Counters(_converted(model, conversion), torch.device("cpu"))
        for part in parts:
            counters.merge(part["sums"])
        return _frame(counters, conversion)


def _converted(model: PreTrainedModel, conversion: Conversion) -> list[Site]:
    names = {*conversion.neurons.sites}
    return [site for site in find_sites(model) if site.name in names]


def _ports(
    model: PreTrainedModel, conversion: Conversion, counters: Counters
) -> dict[str, ErrorPort]:
    from stages.ports.patched import parameters  # take seconds to import what they need
    from stages.ports.port import ErrorPort
    from stages.ports.tables import Tables

    coding, tables = conversion.coding, Tables()
    converted = parameters(conversion, find_sites(model), device_of(model))
    return {
        site.name: ErrorPort(coding, converted[site.name], SiteCounter(counters, index), tables)
        for index, site in enumerate(counters.sites)
    }


def _frame(counters: Counters, conversion: Conversion) -> pd.DataFrame:
    neurons = conversion.neurons
    frame = counters.frame({*neurons.sites})
    frame["nmse"] = frame["error"] / frame["power"]
    if not conversion.coding.neuron:
        frame["spikes"] = float("nan")  # a bound quantises but does not spike
    for name, value in (("nmse_atoms", neurons.nmse), ("bound_db", neurons.bound_db)):
        frame[name] = frame["site"].map(dict(zip(neurons.sites, value.tolist(), strict=True)))
    return frame.drop(columns=["macs", "acs", "error", "power", "nonzero"])
