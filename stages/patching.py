"""Stage 4: measures what the fitted neurons do to live activations of the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from stages.errors import InputError
from stages.fitted import Conversion
from stages.model.offload import device_of
from stages.model.sites import find_sites
from stages.ports.counters import Counters, SiteCounter

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel


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
        from stages.ports.hooks import stream  # take seconds to import what they need
        from stages.ports.patched import parameters
        from stages.ports.port import ErrorPort

        sites = find_sites(model)
        converted = parameters(conversion, sites, device_of(model))
        kept = [site for site in sites if site.name in converted]
        counters = Counters(kept, device_of(model))
        ports = {
            site.name: ErrorPort(
                conversion.coding, converted[site.name], SiteCounter(counters, index)
            )
            for index, site in enumerate(kept)
        }
        stream(model, ids, batch, ports, "patching")
        frame = counters.frame(set(converted))
        frame["nmse"] = frame["error"] / frame["power"]
        if not conversion.coding.neuron:
            frame["spikes"] = float("nan")  # a bound quantises but does not spike
        neurons = conversion.neurons
        for name, value in (("nmse_atoms", neurons.nmse), ("bound_db", neurons.bound_db)):
            frame[name] = frame["site"].map(dict(zip(neurons.sites, value.tolist(), strict=True)))
        return frame.drop(columns=["macs", "acs", "error", "power", "nonzero"])
