"""The stepped model beside the fast one, every site going on from what it has in the fast path.

A value whose last bit lies on the other side of a threshold is another code, and the next layers
follow it: left alone, two sums of another order drift apart though neither is wrong.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.codings.base import site_params
from stages.fitted import Conversion
from stages.model.sites import find_sites
from stages.ports.counters import Counters, SiteCounter
from stages.ports.hooks import attached
from stages.ports.port import SpikingPort
from stages.ports.stepped import SteppedPort
from stages.ports.visibility import View


class Kept(SpikingPort):
    """The fast path, which keeps what reaches the site."""

    seen: Tensor

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        self.seen = x
        return super().__call__(x, real, fanout)

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        self.seen = scores.clone()
        return super().softmax(scores, scaling, view)


class Held(SteppedPort):
    """The stepped path on what reached the site in the fast one; `far` is how far it was from that."""

    kept: Kept
    far: float | None = None

    def _held(self, x: Tensor) -> Tensor:
        expected = self.kept.seen
        self.far = float((x - expected).abs().max() / expected.abs().max())
        return expected

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        return super().__call__(self._held(x), real, fanout)

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        return super().softmax(self._held(scores), scaling, view)


@dataclass(frozen=True)
class Comparison:
    """`far` [site]: largest difference of what reached it, relative to the largest value; `logits`:
    the relative difference in norm; `counters` of both, [sites, fields]."""

    far: dict[str, float]
    logits: float
    counters: tuple[Tensor, Tensor]


def compare(model: PreTrainedModel, conversion: Conversion, ids: Tensor) -> Comparison:
    """One pass of at most one block of queries, fast and stepped."""
    sites = find_sites(model)
    params = {
        name: site_params(conversion.neurons.fit.params, index)
        for index, name in enumerate(conversion.neurons.sites)
    }
    sums, logits = [], []
    kept: dict[str, Kept] = {}
    held: dict[str, Held] = {}
    for kind in (Kept, Held):
        counters = Counters(sites, "cpu")
        rows = {site.name: SiteCounter(counters, i) for i, site in enumerate(sites)}
        ports = {n: kind(conversion.coding, own, rows[n]) for n, own in params.items()}
        kept |= {n: port for n, port in ports.items() if isinstance(port, Kept)}
        held |= {n: port for n, port in ports.items() if isinstance(port, Held)}
        for name, port in held.items():
            port.kept = kept[name]
        with torch.inference_mode(), attached(model, sites, ports):
            logits.append(model(ids, use_cache=False).logits)
        sums.append(counters.sums)
    far = {name: port.far for name, port in held.items() if port.far is not None}
    away = float((logits[1] - logits[0]).norm() / logits[0].norm())
    return Comparison(far, away, (sums[0], sums[1]))
