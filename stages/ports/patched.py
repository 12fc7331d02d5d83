"""The spiking model: the neurons of a conversion on the sites of a model, while a context is open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.codings.base import site_params
from stages.errors import InputError
from stages.fitted import Conversion
from stages.model.offload import device_of
from stages.model.sites import Site, find_sites
from stages.ports.attention import Port
from stages.ports.counters import Counters, SiteCounter
from stages.ports.hooks import attached
from stages.ports.port import DensePort, SpikingPort
from stages.ports.stepped import stepped_ports
from stages.ports.tables import Tables


@contextmanager
def patched(
    model: PreTrainedModel,
    conversion: Conversion | None,
    counters: Counters | None = None,
    execution: str = "fast",
    steps: int | None = None,
    held: nn.Module | None = None,
) -> Iterator[int]:
    """Make the model spiking while the context is open, or let the dense one count its MACs without a
    conversion; yields the number of converted sites.

    `execution`: `fast` multiplies decoded values, `stepped` runs every neuron step by step and lets
    its spikes add up weights. `steps` multiplies what has arrived after the first of them. `held`: a
    module whose buffers are the parameters, which may be loaded or changed while the context is open.
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
    with attached(model, sites, ports) as state:
        if held is not None and conversion is not None:
            spikes = {name: port for name, port in ports.items() if isinstance(port, SpikingPort)}
            state.renew = _Held(held, conversion, spikes).changed
        yield len(converted)


class _Held:
    """Parameters in the buffers of a module, read again by ports once they are not what they were."""

    def __init__(
        self, module: nn.Module, conversion: Conversion, ports: Mapping[str, SpikingPort]
    ) -> None:
        self._module, self._conversion, self._ports = module, conversion, ports
        self._before = self._versions()

    def changed(self) -> bool:
        """Let the ports read parameters that were loaded, changed in place or moved; say whether so."""
        now = self._versions()
        same = [a is b and v == w for (a, v), (b, w) in zip(self._before, now, strict=True)]
        if all(same) or any(value.is_meta for value, _ in now):  # on disk: ports have read them
            return False
        self._before = now
        tables, params = Tables(), dict(self._module.named_buffers())
        for index, site in enumerate(self._conversion.neurons.sites):
            own = site_params(params, index)
            self._ports[site].read(self._conversion.coding, own, tables)
        return True

    def _versions(self) -> list[tuple[Tensor, int | None]]:
        """Every parameter, and how often it was changed in place; inference keeps no number."""
        values = self._module.buffers()
        return [(value, None if value.is_inference() else value._version) for value in values]


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
