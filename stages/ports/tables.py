"""The codes of a model's sites by tables: the same on few values and on many, whatever the coding.

On a CPU a compiled table takes the place of a kernel, which would be compiled anew for every coding and T;
on a GPU, and where there is no compiler, it codes few values in fewer operations.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.codings.base import Coding
from stages.neurons.channels import CENTRE, CHANNEL, centre, unit, unscaled
from stages.neurons.lookup import Lookup, lookups
from stages.neurons.selection import Selection, readable, selection
from stages.neurons.spikes import Params
from stages.neurons.stairs import ALONE, Stairs, addressed, fits, library, stairs
from stages.ports.kernels import EAGER_BELOW, coded_rows, dense_softmax, softmax

TABLE_AFTER = 8  # calls on few values, a token each: after them a table of the code pays
TABLES_AT_ONCE = 64
MOST_MADE = 1024
REST = {CHANNEL: 1.0, CENTRE: 0.0}  # of channels that no text has reached


@dataclass
class Made:
    """The table of a code, and what is compiled of it; None where there is none."""

    table: Lookup | None

    def __deepcopy__(self, memo: object) -> Made:
        return self  # never changed, and partly at an address

    @cached_property
    def stairs(self) -> Stairs | None:
        return None if self.table is None else stairs(self.table)

    @cached_property
    def selection(self) -> Selection | None:
        return None if self.stairs is None else selection(self.stairs)


# Of codings with parameters, which one process binds to models again and again.
_MADE: dict[Any, Made] = {}
_MAKING = threading.Lock()  # of one thread, for which others wait that pass the same model


class Tables:
    """Tables of the codes of a model, made together for all its sites when one of them pays."""

    def __init__(self) -> None:
        self._waiting: list[Tabulated] = []

    def expect(self, site: Tabulated) -> None:
        """Make a table for this site with those of the others."""
        self._waiting.append(site)

    def make(self) -> None:
        """Give all sites that wait their tables."""
        with _MAKING:
            self._make()

    def _make(self) -> None:
        waiting, self._waiting = self._waiting, []
        keys = [site.key() for site in waiting]
        found = {key: _MADE[key] for key in keys if key in _MADE}
        groups: dict[Any, dict[Any, Params]] = {}
        for site, key in zip(waiting, keys, strict=True):
            if key not in found:
                shapes = tuple((name, each.shape) for name, each in site.params.items())
                groups.setdefault((site.coding, shapes), {})[key] = site.params
        for (coding, _), sites in groups.items():
            every = list(sites)
            for start in range(0, len(every), TABLES_AT_ONCE):
                some = every[start : start + TABLES_AT_ONCE]
                tables = lookups(coding, [sites[key] for key in some])
                found.update(zip(some, map(Made, tables), strict=True))
        if len(_MADE) + len(found) > MOST_MADE:
            _MADE.clear()
        _MADE.update(found)
        for site, key in zip(waiting, keys, strict=True):
            site.hold(found[key])


class Tabulated:
    """Codes the values of one site by a table of its code, once there is one."""

    def __init__(self, coding: Coding, params: Params, counted: bool, tables: Tables) -> None:
        self.coding, self.params = coding, unscaled(params)
        self._channels = {name: params[name] for name in REST if name in params}
        self._counted, self._tables, self._calls = counted, tables, 0
        # Tables are of float32, and of parameters that stay.
        other = any(
            x.requires_grad or x.is_floating_point() and x.dtype != torch.float32
            for x in self.params.values()
        )
        self._made: Made | None = Made(None) if coding.tokenwise or other else None
        self._quick: Stairs | None = None  # of values that are not counted, as they are
        if self._made is None:
            tables.expect(self)

    def key(self) -> Any:
        """What a table follows from, and whether it is compiled."""
        own = ((name, x.shape, x.cpu().numpy().tobytes()) for name, x in self.params.items())
        return (self.coding, library() is not None, *own)

    def hold(self, made: Made) -> None:
        """Code by this table, if there is one."""
        self._made = made
        self._quick = None if self._counted or self._channels else made.stairs

    def rows(
        self, x: Tensor, p: Params, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """What `stages.ports.kernels.row_kernel` gives; None where no table codes x. `into`: where codes
        are to stand if they can, x among others."""
        quick = self._quick
        if quick is not None and x.numel() < ALONE and fits(x) and x.is_contiguous():
            value = quick.values(x)
            return value, value
        made = self._ready(x)
        if made is None:
            return None
        if made.stairs is None:
            return coded_rows(self._read, self._counted, x, unit(x, p), centre(x, p), p)
        given = x.float()
        if x.dim() != 4 or given.stride(-1) != 1:
            given = given.contiguous()
        out = into
        if out is None or out.dtype != torch.float32 or out.stride(-1) != 1:
            out = given.new_empty(x.shape)
        scale, mean = (self._channel(name, x) for name in REST)
        spikes = made.stairs.rows(given, out, scale, mean, self._counted)
        return out.to(x.dtype), out if spikes is None else spikes

    def softmax(
        self, scores: Tensor, scaling: float, bias: Tensor
    ) -> tuple[Tensor, Tensor | None] | None:
        """What `stages.ports.kernels.softmax_kernel` gives, likewise."""
        made = None if self.coding.replaces_softmax else self._ready(scores)
        if made is None or not (fits(scores) or scores.numel() < EAGER_BELOW):
            return None
        if made.stairs is None:
            value, spikes = self._read(softmax(scores, scaling, bias), {})
            fired = torch.where(bias == 0, spikes, 0).sum(-1) if self._counted else None
            return value.to(scores.dtype), fired
        probs = dense_softmax(scores.float(), scaling, bias)
        fired = made.stairs.rows(probs, probs, counted=self._counted)
        if fired is not None:  # but for those of keys that a query does not see; of no number none
            unseen = (bias != 0).sum(-1)
            fired = (fired - made.stairs.spikes_of_zero * unseen).clamp_(min=0)
            fired = fired * (unseen < bias.shape[-1])
        return probs.to(scores.dtype), fired

    def attend(
        self,
        scores: Tensor,
        scaling: float,
        bias: Tensor | None,
        value: Tensor,
        out: Tensor,
    ) -> Tensor | None:
        """Put what attention gives into `out` by a compiled `Selection`, where there is one, and return
        the spikes of every row; None else."""
        given = fits(value) and value.stride(-1) == 1
        given = given and value.shape[2:] == (scores.shape[-1], out.shape[-1])
        later = self._made is None and scores.numel() < EAGER_BELOW  # `softmax` will make a table
        if self.coding.replaces_softmax or later or not (given and readable(scores, bias)):
            return None
        made = self._ready(scores)
        found = None if made is None else made.selection
        return None if found is None else found(scores, scaling, bias, value, out)

    def _ready(self, x: Tensor) -> Made | None:
        """The table, if there is one and x is to be coded by it."""
        if not addressed(x):
            return None
        few = x.numel() < EAGER_BELOW
        if self._made is None:
            self._calls += 1
            if not (self._calls >= TABLE_AFTER if few else x.is_cpu and library() is not None):
                return None
            self._tables.make()
        assert self._made is not None
        if self._made.table is None:
            return None
        if self._made.table.edge.device != x.device:
            self.hold(Made(self._made.table.to(x.device)))
        return self._made if few or self._made.stairs is not None else None

    def _channel(self, name: str, x: Tensor) -> Tensor | None:
        """The scales or the means of all channels of x [..., C] or [B, H, S, D], float32 side by side."""
        if name not in self._channels:
            return None
        width = x.shape[-1] * (x.shape[1] if x.dim() == 4 else 1)
        own = self._channels[name]
        plain = own.dtype == torch.float32 and own.is_cpu and own.is_contiguous()
        if len(own) < width or not plain:
            own = functional.pad(own.float().cpu(), (0, max(0, width - len(own))), value=REST[name])
            own = self._channels[name] = own.contiguous()
        return own

    def _read(self, u: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        assert self._made is not None and self._made.table is not None
        value, stair = self._made.table(u)
        return value, self._made.table.spikes.take(stair) if self._counted else value
