"""Stage 1: streams calibration tokens through the dense model into one sketch per site."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.errors import InputError
from stages.model.shares import Part, Parts, Share, run_shares
from stages.model.sites import Site
from stages.ports.kernels import dense_softmax
from stages.sketch import MOST_BITS, SUB_BITS, Accumulator, Grid, SketchSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.ports.visibility import View

log = logging.getLogger(__name__)
UNREACHED = ("error", "dense")
FIELDS = ("code", "count", "range", "absmax", "square")  # of `Accumulator.part`
SITES_AT_ONCE = 64  # of a megabyte each while their bins are dense


@dataclass(frozen=True)
class Capture:
    """`mantissa_bits` leading mantissa bits tell bins apart; 7 is exact for a bfloat16 model.

    `unreached`: an expert that no calibration token was routed to is an `error`, or stays `dense`.
    """

    mantissa_bits: int = 7
    unreached: str = "error"

    def __post_init__(self) -> None:
        most = MOST_BITS - SUB_BITS
        if not isinstance(self.mantissa_bits, int) or not 1 <= self.mantissa_bits <= most:
            raise InputError(
                f"capture.mantissa_bits={self.mantissa_bits!r}: give a whole number from 1 to {most}"
            )
        if self.unreached not in UNREACHED:
            raise InputError(
                f"capture.unreached={self.unreached!r}: choose {' or '.join(UNREACHED)}"
            )

    def run(
        self, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
    ) -> SketchSet:
        """Sketch `sites` over full windows ids [windows, length].

        Raises InputError where a site holds values that are not finite, or was not reached, and for
        a loaded spiking model.
        """
        from stages.ports.hooks import stream  # takes seconds to import what it needs

        ports = self._ports(model, sites)

        def after() -> None:
            for port in ports.values():
                if port.reached:
                    port.accumulator.close()

        def through(layer: int) -> None:
            for site in sites:
                if site.layer == layer and ports[site.name].reached:
                    ports[site.name].accumulator.finish()

        stream(model, ids, batch, ports, "capture", after=after, through=through)
        return self._collected(sites, ports)

    def run_shares(
        self, model: PreTrainedModel, shares: Iterable[Share], sites: Sequence[Site]
    ) -> None:
        """Sketch the batches of `shares` by themselves; `merged` makes of their parts what `run` makes."""
        from stages.ports.hooks import stream  # likewise

        ports = self._ports(model, sites)

        def take() -> Part:
            return {
                f"{index} {name}": value
                for index, site in enumerate(sites)
                for name, value in ports[site.name].take().items()
            }

        run_shares(
            model,
            shares,
            take,
            lambda batches, after: stream(model, batches, 0, ports, "capture", after=after),
        )

    def merged(self, model: PreTrainedModel, sites: Sequence[Site], parts: Parts) -> SketchSet:
        """The sketches of what all batches have left. Raises what `run` does."""
        ports = self._ports(model, sites)
        every = [(str(index), ports[site.name]) for index, site in enumerate(sites)]
        for start in range(0, len(every), SITES_AT_ONCE):
            block = dict(every[start : start + SITES_AT_ONCE])
            for part in parts.chosen(partial(_among, block)):
                for index, port in block.items():
                    port.merge(part, index)
            for port in block.values():
                if port.reached:
                    port.accumulator.finish()
        return self._collected(sites, ports)

    def _ports(self, model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, SketchPort]:
        grid = Grid(self.mantissa_bits)
        exact = model.dtype == torch.bfloat16 and self.mantissa_bits >= 7
        return {site.name: SketchPort(grid, exact, site) for site in sites}

    def _collected(self, sites: Sequence[Site], ports: Mapping[str, SketchPort]) -> SketchSet:
        reached = self._reached(sites, ports)
        named = [(site.name, site.role, site.layer) for site in reached]
        accumulators = [ports[site.name].accumulator for site in reached]
        sketches = SketchSet.collect(named, Grid(self.mantissa_bits), accumulators)
        sketches.check_finite()
        unreached = tuple(site.name for site in sites if not ports[site.name].reached)
        return replace(sketches, unreached=unreached)

    def _reached(self, sites: Sequence[Site], ports: Mapping[str, SketchPort]) -> list[Site]:
        """The sites with values; those without are experts, which are refused or stay dense."""
        missed = [site for site in sites if not ports[site.name].reached]
        experts = list(dict.fromkeys(f"{s.path}[{s.expert[1]}]" for s in missed if s.expert))
        if experts:
            fault = (
                f"{len(experts)} experts were reached by no calibration token, the first are "
                f"{', '.join(experts[:4])}"
            )
            if self.unreached == "error":
                raise InputError(
                    f"{fault}: raise calibration.windows, or leave them dense, capture.unreached=dense"
                )
            log.warning("%s: they stay dense", fault)
        return [site for site in sites if site.expert is None or ports[site.name].reached]


def _among(indices: Container[str], name: str) -> bool:
    return name.partition(" ")[0] in indices


class SketchPort:
    """Adds what passes to the site's sketch, and passes it on."""

    plain = whole = False

    def __init__(self, grid: Grid, exact: bool, site: Site) -> None:
        self._grid, self._exact = grid, exact
        self._sparse = site.expert is not None
        self._channels = site.port != "probs" and not self._sparse
        self._accumulator: Accumulator | None = None

    @property
    def reached(self) -> bool:
        """Whether any value has passed."""
        return self._accumulator is not None

    @property
    def accumulator(self) -> Accumulator:
        if self._accumulator is None:
            raise RuntimeError("a site was never reached by the forward pass")
        return self._accumulator

    def take(self) -> Part:
        """Return the part of the values since the last call, and start the next; empty without values."""
        accumulator, self._accumulator = self._accumulator, None
        return {} if accumulator is None else accumulator.part()

    def merge(self, part: Part, index: str) -> None:
        """Add what this site has left of a batch, under its number; nothing where that is not there."""
        of = {name: part[f"{index} {name}"] for name in FIELDS if f"{index} {name}" in part}
        if of:
            self._grown(len(of.get("absmax", ())), torch.device("cpu")).merge(of)

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        # [B, H, S, D] of an attention port: a channel is a head's dimension.
        flat = x.transpose(1, 2).flatten(2) if x.dim() == 4 else x
        self._add(flat if real is None else flat[real.view(flat.shape[:-1])])
        return x

    def constant(self, x: Tensor) -> Tensor | None:
        return None

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, None]:
        probs = dense_softmax(scores, scaling, view.bias)
        # Masked entries are exact zeros; the sketch counts the unmasked ones.
        masked = probs.numel() - view.seen.sum() * probs.shape[1]
        self._add(probs, masked)
        return probs, None

    def tally(self, spikes: Tensor | None, view: View, heads: int, fanout: int) -> None:
        return None

    def _add(self, x: Tensor, surplus_zeros: Tensor | int = 0) -> None:
        channels = x.shape[-1] if self._channels else 0
        self._grown(channels, x.device).add(x, surplus_zeros)

    def _grown(self, channels: int, device: torch.device) -> Accumulator:
        if self._accumulator is None:
            self._accumulator = Accumulator(self._grid, channels, self._exact, device, self._sparse)
        return self._accumulator
