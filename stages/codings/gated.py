"""Range-gated base-2 neurons: n ranges, of which the smallest that holds a value codes it.

The density of levels is piecewise constant, the n-piece approximation of lambda* ∝ p^(1/3). The ranges
come from a search over the distribution, not from a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.codings import ranges
from stages.codings.allocation import ALLOCATIONS, BUDGETS, REACH, allocate
from stages.codings.coding import MAX_TIMESTEPS, Fit, Statistic, check_timesteps
from stages.codings.neurons import Params
from stages.codings.range_search import (
    SITES_AT_ONCE,
    adjacent_ranges,
    coordinate_search,
    nested_ranges,
)
from stages.errors import InputError
from stages.llm.sensitivity import Sensitivity, relative_weight

if TYPE_CHECKING:
    from stages.distribution import Atoms
    from stages.fitting import Algorithm1


@dataclass(frozen=True)
class Gated:
    """`grains` neurons per activation with scales tau_1 < … < tau_n and v0 = tau_k 2^-(T+1).

    Gate: the smallest k with |x| < tau_k (1 - 2^-(T+1)), else n, which saturates. Only that neuron
    spikes. n neurons are log2(n) more bits: compare at equal T + log2(n) too.

    `offset`: neuron k codes |x| - tau_(k-1) for one more spike, so that all n 2^T levels differ.
    `grain_steps`: T_k - T of every neuron (None: all T). `mu`: the fit minimises
    E(SN(x) - x)^2 / E x^2 + mu E[spikes]. `sensitivity`: errors weigh as much as the loss curves at
    their magnitude. `allocation` budget: T differs from site to site, least predicted loss at a mean
    T over sites (`budget` timesteps) or at the spikes, weighted by fan-out, that T everywhere
    would give (`budget` spikes).
    """

    name: str
    timesteps: int
    grains: int
    offset: bool = False
    grain_steps: tuple[int, ...] | None = None
    mu: float = 0.0
    sensitivity: Sensitivity | None = None
    allocation: str = "uniform"
    budget: str = "timesteps"

    trained = False
    neuron = True
    convention = "bit_plane"
    signed = False

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)
        if not isinstance(self.grains, int) or not 1 <= self.grains <= 8:
            raise InputError(
                f"coding.grains={self.grains!r} for {self.name}: give a whole number from 1 to 8"
            )
        if self.grain_steps is not None:
            object.__setattr__(self, "grain_steps", tuple(self.grain_steps))
        steps = self.steps(self.timesteps)
        if len(steps) != self.grains or min(steps) < 1 or max(steps) > MAX_TIMESTEPS:
            raise InputError(
                f"coding.grain_steps={list(self.grain_steps or ())} for {self.name}: give one whole "
                f"number for each of the {self.grains} grains, so that 1 <= T + it <= {MAX_TIMESTEPS}"
            )
        if self.mu < 0:
            raise InputError(f"coding.mu={self.mu} for {self.name}: give 0 or more")
        if self.allocation not in ALLOCATIONS or self.budget not in BUDGETS:
            raise InputError(
                f"coding.allocation={self.allocation!r}, coding.budget={self.budget!r} for "
                f"{self.name}: choose {' or '.join(ALLOCATIONS)}, and {' or '.join(BUDGETS)}"
            )
        if self.allocation == "budget" and self.sensitivity is None:
            raise InputError(
                f"coding.allocation=budget for {self.name} weighs sites by their measured "
                "sensitivity: give coding.sensitivity (conf/coding/gated_budget.yaml has one)"
            )

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return () if self.sensitivity is None else (self.sensitivity,)

    @property
    def decode_macs(self) -> int:
        return self.grains

    @property
    def gate_comparisons(self) -> int:
        return self.grains - 1

    @property
    def longest(self) -> int:
        """Steps of the longest neuron that the fit may choose."""
        reach = REACH[-1] if self.allocation == "budget" else 0
        return max(self.steps(min(self.timesteps + reach, MAX_TIMESTEPS)))

    def steps(self, timesteps: int) -> tuple[int, ...]:
        """T_k of every neuron where T = `timesteps`."""
        return tuple(timesteps + more for more in self.grain_steps or (0,) * self.grains)

    def fit(self, atoms: Atoms, algorithm: Algorithm1 | None) -> Fit:
        if self.allocation == "budget":
            return Fit(allocate(self, atoms))
        return Fit(self.fit_at(atoms, self.timesteps))

    def fit_at(self, atoms: Atoms, timesteps: int) -> dict[str, Tensor]:
        """Parameters of all sites where T = `timesteps`."""
        rows = torch.arange(len(atoms.value)).split(SITES_AT_ONCE)
        parts = [self._fit(atoms.rows(index), timesteps) for index in rows]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _fit(self, atoms: Atoms, timesteps: int) -> dict[str, Tensor]:
        steps = self.steps(timesteps)
        weight = atoms.weight
        if self.sensitivity is not None:
            weight = weight * relative_weight(atoms.statistics[self.sensitivity.name], atoms)
        scale = nested_ranges(atoms.value, atoms.spread, weight, steps)
        if self.offset or self.mu or self.grain_steps:
            starts = [scale]
            if self.offset:
                starts.append(adjacent_ranges(atoms.value, weight, steps))
            scale = self._refine(atoms, weight, starts, steps)
        return dict(self._bank(scale, steps))

    def _bank(self, scale: Tensor, steps: tuple[int, ...]) -> Params:
        """Parameters of neurons with these scales [..., n]."""
        p = {"scale": scale}
        if set(steps) != {self.timesteps} or self.allocation == "budget":
            p["steps"] = (2.0 ** torch.tensor(steps)).to(scale).expand_as(scale)
        if self.offset:
            p["floor"] = torch.nn.functional.pad(scale[..., :-1], (1, 0))
        return p

    def _refine(
        self, atoms: Atoms, weight: Tensor, starts: list[Tensor], steps: tuple[int, ...]
    ) -> Tensor:
        """The best outcome of a coordinate search from every start, [sites, n]."""
        x, own = atoms.points()
        importance = weight / atoms.weight.clamp(min=1e-300)
        heavy = own * importance.repeat_interleave(x.shape[1] // importance.shape[1], -1)
        x = x.float()[:, None]
        power = (heavy * x[:, 0].double() ** 2).sum(-1, keepdim=True)

        def cost(scale: Tensor, p: Params) -> Tensor:
            value, count = self.quantise(x, {name: t.float() for name, t in p.items()})
            error = ((value - x).square() @ heavy.float()[..., None]).squeeze(-1) / power
            spikes = (count @ own.float()[..., None]).squeeze(-1)
            return error + self.mu * spikes

        found = [coordinate_search(s, cost, lambda scale: self._bank(scale, steps)) for s in starts]
        costs = torch.cat([cost(s[:, None], self._bank(s[:, None], steps)) for s in found], -1)
        pick = costs.argmin(-1)[:, None, None].expand(-1, 1, self.grains)
        return torch.stack(found, 1).gather(1, pick).squeeze(1)

    def encode(self, x: Tensor, p: Params) -> ranges.RangeSpikes:
        return ranges.encode(x, p, self.timesteps, self.longest, self.signed)

    def table(self, p: Params) -> Tensor:
        return ranges.table(p, self.timesteps, self.longest)

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        return ranges.quantise(x, p, self.timesteps, self.longest, self.signed)
