"""Range-gated neurons: n ranges, of which the smallest that holds a value codes it.

The density of levels is piecewise constant, the n-piece approximation of lambda* ∝ p^(1/3). The ranges
come from a search over the distribution, not from a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import (
    MAX_TIMESTEPS,
    Coding,
    Sensitive,
    check_prices,
    check_timesteps,
    error_and_spikes,
)
from stages.compiler import fused
from stages.errors import InputError
from stages.fits.allocation import ALLOCATIONS, BUDGETS, REACH, cheapest, picked
from stages.fits.range_search import (
    SITES_AT_ONCE,
    adjacent_ranges,
    coordinate_search,
    nested_ranges,
)
from stages.fits.sensitivity import Sensitivity, loss_weight, predicted_loss
from stages.fitted import Fit
from stages.neurons import ranges
from stages.neurons.decoding import Decoding
from stages.neurons.spikes import Params
from stages.registry import register

RADICES = tuple(2**bits for bits in range(1, MAX_TIMESTEPS + 1))


@register("coding/gated", was="stages.codings.gated.Gated")
@dataclass(frozen=True)
class Gated(Sensitive):
    """`grains` neurons per activation with scales tau_1 < … < tau_n and v0 = tau_k 2^-(T+1).

    Gate: the smallest k with |x| < tau_k (1 - 2^-(T+1)), else n, which saturates. Only that neuron
    spikes. n neurons are log2(n) more bits: compare at equal T + log2(n) too.

    `offset`: neuron k codes |x| - tau_(k-1) for one more spike, so that all n 2^T levels differ.
    `grain_steps`: T_k - T of every neuron (None: all T). `mu` is the price of a spike: the fit
    minimises E(SN(x) - x)^2 / E x^2 + mu E[spikes]; with `sensitivity`, where errors weigh what they
    cost the model at their magnitude, the predicted loss in nats a token + mu times the spikes a
    value weighted by the site's part in all multiplications. `allocation` lets T differ by site:
    `budget` has the least predicted loss at a mean T over sites (`budget` timesteps) or at the
    spikes, weighted by fan-out, of T everywhere (`budget` spikes); `price` the least predicted loss
    + mu times spikes, so that a sweep over mu draws the frontier.

    `radix` R = 2^r: the T_k bits are sent as digits of r bits, one spike a digit at the step of its
    value and none for zero (`stages.neurons.digits`): the same levels with fewer spikes over more steps;
    R = 2^T or more is one spike in time. With `offset` the highest digit then always spikes, and for
    the floor too. Parameters may give r by site as `radix` [S], which is used instead.
    """

    name: str = "gated"
    timesteps: int = 6
    grains: int = 2
    offset: bool = False
    grain_steps: tuple[int, ...] | None = None
    mu: float = 0.0
    sensitivity: Sensitivity | None = None
    allocation: str = "uniform"
    budget: str = "timesteps"
    radix: int = 2

    signed = False

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)
        self.check_sensitivity("ranges")
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
        if type(self.radix) is not int or self.radix not in RADICES:
            raise InputError(
                f"coding.radix={self.radix!r} for {self.name}: give a power of two from 2 to {RADICES[-1]}"
            )
        check_prices(self.name, mu=self.mu)
        if self.allocation not in ALLOCATIONS or self.budget not in BUDGETS:
            raise InputError(
                f"coding.allocation={self.allocation!r}, coding.budget={self.budget!r} for "
                f"{self.name}: choose {' or '.join(ALLOCATIONS)}, and {' or '.join(BUDGETS)}"
            )
        if self.allocation != "uniform" and self.sensitivity is None:
            raise InputError(
                f"coding.allocation={self.allocation} for {self.name} weighs sites by their measured "
                "sensitivity: give coding.sensitivity (conf/coding/gated_budget.yaml has one)"
            )

    @property
    def gate_comparisons(self) -> int:
        return self.grains - 1

    @property
    def convention(self) -> str:  # type: ignore[override]
        return "bit_plane" if self.radix == 2 else "digit"

    @property
    def digit_bits(self) -> int:
        """r of the radix 2^r."""
        return self.radix.bit_length() - 1

    @property
    def longest(self) -> int:
        """T of the longest neuron that the fit may choose."""
        reach = 0 if self.allocation == "uniform" else REACH[-1]
        return max(self.steps(min(self.timesteps + reach, MAX_TIMESTEPS)))

    def steps(self, timesteps: int) -> tuple[int, ...]:
        """T_k of every neuron where T = `timesteps`."""
        return tuple(timesteps + more for more in self.grain_steps or (0,) * self.grains)

    def cost(self, seen: Atoms) -> Tensor:
        """Predicted loss of every site at T, with the price of its spikes, [sites]."""
        assert self.sensitivity is not None
        params = self.fit_at(seen, self.timesteps)
        loss = predicted_loss(self.quantise, seen, params, seen.statistics[self.sensitivity.name])
        price = self.objective(seen)[1]
        return loss + price * error_and_spikes(self, seen, params)[1] if self.mu else loss

    def fit(self, atoms: Atoms) -> Fit:
        if self.allocation == "uniform":
            return Fit(self.fit_at(atoms, self.timesteps))
        return Fit(self._allocated(atoms))

    def fit_at(self, atoms: Atoms, timesteps: int) -> dict[str, Tensor]:
        """Parameters of all sites where T = `timesteps`."""
        weight, price = self.objective(atoms)
        steps = self.steps(timesteps)
        rows = torch.arange(len(price)).split(SITES_AT_ONCE)
        parts = [self._fit(atoms.rows(i), weight[i], price[i], steps) for i in rows]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def objective(self, atoms: Atoms) -> tuple[Tensor, Tensor]:
        """What a squared error at every atom [S, K] and a spike a value at every site [S] cost."""
        if self.sensitivity is None:
            power = atoms.power()
            return atoms.errors() / power[:, None], torch.full_like(power, self.mu)
        statistic = atoms.statistics[self.sensitivity.name]
        return loss_weight(statistic, atoms), self.mu * statistic["macs"] / statistic["macs"].sum()

    def _allocated(self, atoms: Atoms) -> dict[str, Tensor]:
        """Parameters of all sites, each at the T that the budget or the price of a spike gives it.

        The cost of a site is its T, or its spikes weighted by fan-out.
        """
        assert self.sensitivity is not None
        statistic = atoms.statistics[self.sensitivity.name]
        choices = self._choices()
        fits = [self.fit_at(atoms, t) for t in choices]
        losses = [predicted_loss(self.quantise, atoms, p, statistic) for p in fits]
        loss = torch.stack(losses, -1)
        if self.allocation == "budget" and self.budget == "timesteps":
            cost = torch.tensor(choices, dtype=torch.float64).expand_as(loss)
        else:
            spikes = torch.stack([error_and_spikes(self, atoms, p)[1] for p in fits], -1)
            cost = spikes * statistic["macs"][:, None] / statistic["macs"].sum()
        if self.allocation == "price":
            return picked(fits, (loss + self.mu * cost).argmin(-1))
        allowed = float(cost[:, choices.index(self.timesteps)].sum())
        return picked(fits, cheapest(loss, cost, allowed))

    def _choices(self) -> list[int]:
        """The T that a site may have."""
        lowest = max(1, 1 - min(self.steps(0)))
        highest = MAX_TIMESTEPS - max(self.steps(0))
        return [t for r in REACH if lowest <= (t := self.timesteps + r) <= highest]

    def _fit(
        self, atoms: Atoms, weight: Tensor, price: Tensor, steps: tuple[int, ...]
    ) -> dict[str, Tensor]:
        scale = nested_ranges(atoms.value, atoms.spread, weight, steps)
        if self.offset or self.mu or self.grain_steps:
            starts = [scale]
            if self.offset:
                starts.append(adjacent_ranges(atoms.value, weight, steps))
            scale = self._refine(atoms, weight, price, starts, steps)
        p = self._bank(scale, steps)
        if set(steps) == {self.timesteps} and self.allocation == "uniform":
            del p["steps"]  # they are those of the coding
        return p

    def _bank(self, scale: Tensor, steps: tuple[int, ...]) -> dict[str, Tensor]:
        """Parameters of neurons with these scales [..., n]."""
        p = {"scale": scale, "steps": (2.0 ** torch.tensor(steps)).to(scale).expand_as(scale)}
        if self.offset:
            p["floor"] = torch.nn.functional.pad(scale[..., :-1], (1, 0))
        return p

    def _refine(
        self,
        atoms: Atoms,
        weight: Tensor,
        price: Tensor,
        starts: list[Tensor],
        steps: tuple[int, ...],
    ) -> Tensor:
        """The best outcome of a coordinate search from every start, [sites, n]."""
        x, mass = atoms.points()
        inside = x.shape[1] // weight.shape[1]
        heavy = (weight / inside).repeat_interleave(inside, -1).float()[:, None]
        given = (x.float()[:, None], heavy, mass.float()[:, None], price[:, None])
        kernel = _objective(self.signed, self.digit_bits)

        def cost(scale: Tensor, p: Params) -> Tensor:
            return kernel(*given, {name: t.float() for name, t in p.items()})

        ends = [coordinate_search(s, cost, lambda scale: self._bank(scale, steps)) for s in starts]
        if len(ends) == 1:
            return ends[0]
        scales = torch.stack(ends, 1)
        costs = cost(scales, self._bank(scales, steps))
        pick = costs.argmin(-1)[:, None, None].expand(-1, 1, self.grains)
        return scales.gather(1, pick).squeeze(1)

    def at_site(self, p: Params) -> tuple[Coding, Params]:
        """The steps of every neuron are parameters here, and so is what follows from them: a kernel would
        divide at every vector of values, and does not combine constants."""
        steps = {"steps": torch.full_like(p["scale"], 2.0**self.timesteps)}
        return self, ranges.prepared({**steps, **p}, self.timesteps)

    def encode(self, x: Tensor, p: Params) -> ranges.RangeSpikes:
        return ranges.encode(x, p, self.timesteps, self.longest, self.signed, self.digit_bits)

    def table(self, p: Params) -> Tensor:
        return ranges.table(p, self.timesteps, self.longest)

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        return ranges.quantise(x, p, self.timesteps, self.signed, self.digit_bits)

    def decoding(self, p: Params) -> Decoding:
        return ranges.decoding(p, self.timesteps, self.signed, self.digit_bits)


@functools.lru_cache(maxsize=16)
def _objective(signed: bool, bits: int) -> Callable[..., Tensor]:
    """What banks with parameters p [S, C, n] cost, [S, C]: squared errors on x [S, 1, K] that weigh
    `heavy`, and spikes of values as frequent as `mass` at a `price` [S, 1].

    T is among the parameters, `steps`: one kernel serves a sweep over it.
    """

    def kernel(x: Tensor, heavy: Tensor, mass: Tensor, price: Tensor, p: Params) -> Tensor:
        value, count = ranges.quantise(x, p, 1, signed, bits)
        return ((value - x).square() * heavy).sum(-1) + price * (count * mass).sum(-1)

    return fused(kernel)
