"""Stage 4: binds fitted neurons to a model, reversibly, and measures them on live activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.codings.base import site_params
from stages.errors import InputError
from stages.fitted import Conversion
from stages.model.offload import device_of
from stages.model.sites import Site, find_sites
from stages.ports.attention import Port
from stages.ports.counters import Counters, SiteCounter
from stages.ports.ports import DensePort, ErrorPort, SpikingPort, attached, stream
from stages.ports.stepped import stepped_ports


@contextmanager
def patched(
    model: PreTrainedModel,
    conversion: Conversion | None,
    counters: Counters | None = None,
    execution: str = "fast",
    steps: int | None = None,
) -> Iterator[int]:
    """The spiking model while the context is open, the dense one (counting its MACs) without a
    conversion; yields the number of converted sites.

    `execution`: `fast` multiplies decoded values, `stepped` runs every neuron step by step and lets
    its spikes add up weights. `steps` multiplies what has arrived after the first of them.
    Raises InputError if the conversion has no site or one that this model lacks, and for a loaded
    spiking model.
    """
    sites = find_sites(model)
    converted = {} if conversion is None else _parameters(conversion, sites, device_of(model))
    rows = _rows(counters)
    if conversion is not None and (execution == "stepped" or steps is not None):
        spiking = stepped_ports(conversion.coding, converted, rows, steps)
        every: dict[str, Port] = {site.name: DensePort(rows.get(site.name)) for site in sites}
        with attached(model, sites, every | dict(spiking)):
            yield len(converted)
        return
    ports = {
        site.name: SpikingPort(conversion.coding, converted[site.name], rows.get(site.name))
        if conversion is not None and site.name in converted
        else DensePort(rows.get(site.name))
        for site in sites
    }
    with attached(model, sites, ports):
        yield len(converted)


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
        """Error and spikes of every converted site on the dense model's values over ids [W, S].

        One row a site: site, role, layer, values, spikes, nmse, nmse_atoms, where nmse is
        sum (SN(x) - x)^2 / sum x^2 over live values that the fit has not seen.
        """
        sites = find_sites(model)
        converted = _parameters(conversion, sites, device_of(model))
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
        atoms = dict(zip(conversion.neurons.sites, conversion.neurons.nmse.tolist(), strict=True))
        frame["nmse_atoms"] = frame["site"].map(atoms)
        return frame.drop(columns=["macs", "acs", "error", "power"])


def _parameters(
    conversion: Conversion, sites: Sequence[Site], device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Parameters by site name, on the model's device."""
    neurons = conversion.neurons
    unresolved = set(neurons.sites) - {site.name for site in sites}
    if unresolved or not neurons.sites:
        raise InputError(
            f"{len(neurons.sites)} fitted sites, {len(unresolved)} of them not in this model "
            f"({', '.join(sorted(unresolved)[:3])}): fit on the model that is converted"
        )
    params = {name: value.to(device) for name, value in neurons.fit.params.items()}
    return {site: site_params(params, index) for index, site in enumerate(neurons.sites)}


def _rows(counters: Counters | None) -> dict[str, SiteCounter]:
    if counters is None:
        return {}
    return {site.name: SiteCounter(counters, i) for i, site in enumerate(counters.sites)}
