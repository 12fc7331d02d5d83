"""The spiking model: the neurons of a conversion on the sites of a model, while a context is open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
from stages.ports.hooks import attached
from stages.ports.kernels import Tables
from stages.ports.port import DensePort, SpikingPort
from stages.ports.stepped import stepped_ports


@contextmanager
def patched(
    model: PreTrainedModel,
    conversion: Conversion | None,
    counters: Counters | None = None,
    execution: str = "fast",
    steps: int | None = None,
) -> Iterator[int]:
    """Make the model spiking while the context is open, or let the dense one count its MACs without a
    conversion; yields the number of converted sites.

    `execution`: `fast` multiplies decoded values, `stepped` runs every neuron step by step and lets
    its spikes add up weights. `steps` multiplies what has arrived after the first of them.
    Raises InputError if the conversion has no site or one that this model lacks, and for a loaded
    spiking model.
    """
    sites = find_sites(model)
    converted = {} if conversion is None else parameters(conversion, sites, device_of(model))
    rows = _rows(counters)
    if conversion is not None and (execution == "stepped" or steps is not None):
        spiking = stepped_ports(conversion.coding, converted, rows, steps)
        every: dict[str, Port] = {site.name: DensePort(rows.get(site.name)) for site in sites}
        with attached(model, sites, every | dict(spiking)):
            yield len(converted)
        return
    tables = Tables()
    ports = {
        site.name: SpikingPort(conversion.coding, converted[site.name], rows.get(site.name), tables)
        if conversion is not None and site.name in converted
        else DensePort(rows.get(site.name))
        for site in sites
    }
    with attached(model, sites, ports):
        yield len(converted)


def parameters(
    conversion: Conversion, sites: Sequence[Site], device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Return the parameters by site name, on the model's device."""
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
