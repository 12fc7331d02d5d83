"""Every site has the code that costs it least, out of several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Coding, Sensitive, check_prices, error_and_spikes
from stages.codings.gated import Gated
from stages.codings.timed import Timed
from stages.errors import InputError
from stages.fits.sensitivity import Sensitivity, mean_error_loss, predicted_loss
from stages.fits.statistics import MULTIPLICATION, Products, Statistic, widths
from stages.fitted import Fit
from stages.neurons.channels import CENTRE
from stages.neurons.decoding import Decoding
from stages.neurons.spikes import Params, Spikes, SpikeTime
from stages.registry import register

CHOICE = "choice"  # the parameter that says which of the codes a site has


@register("coding/mixed")
@dataclass(frozen=True)
class Mixed(Sensitive):
    """Of `choices` each site has the one of least predicted loss + prices, among those that take at most
    `timesteps` steps there. Without choices they are one spike in time and digits in base 16.

    `mu` is the price of a spike a value, weighted by the site's part in all multiplications, and of as
    many additions and multiplications of decoding as cost as much, with the site's width; `nu` that of
    a step. Every choice is fitted with prices of its own, which are best the same. Parameters are those
    of all choices, each name with the number of its choice, and `choice` [S]. With `centre` all choices
    code values about their means at the sites where the first of them costs less for it.
    """

    name: str = "mixed"
    timesteps: int = 128
    choices: tuple[Coding, ...] = ()
    sensitivity: Sensitivity | None = Sensitivity()
    mu: float = 0.05
    nu: float = 0.0
    centre: str = field(default="channel", kw_only=True)

    def __post_init__(self) -> None:
        if self.sensitivity is None:
            raise InputError(
                f"coding={self.name} weighs sites by their measured sensitivity: give coding.sensitivity "
                "(conf/coding/mixed.yaml has one)"
            )
        self.check_sensitivity("levels")
        if type(self.timesteps) is not int or self.timesteps < 1:
            raise InputError(
                f"coding.timesteps={self.timesteps!r} for {self.name}: give the steps that a site may "
                "take, 1 or more"
            )
        check_prices(self.name, mu=self.mu, nu=self.nu)
        given = self.choices or ()
        if not isinstance(given, list | tuple) or any(not isinstance(c, Coding) for c in given):
            raise InputError(f"coding.choices={given!r} for {self.name}: give a list of codings")
        object.__setattr__(self, "choices", tuple(given) or self._usual())
        for each in self.choices:
            if (
                not (each.converts and each.neuron)
                or each.tokenwise
                or each.replaces_softmax
                or each.dense_roles
                or getattr(each, "channels", False)
                or getattr(each, "centred", False)
                or isinstance(each, Mixed)
            ):
                raise InputError(
                    f"coding.choices of {self.name} has {each.name}: give codings of single values at all "
                    "sites, with the same levels for all channels; coding.centre is an option of "
                    f"{self.name} itself"
                )

    def _usual(self) -> tuple[Coding, ...]:
        """One spike in time, and digits in base 16 for narrow products."""
        prices: dict[str, Any] = {"mu": self.mu, "sensitivity": self.sensitivity}
        timed = Timed(timesteps=self.timesteps, grains=2, nu=self.nu, **prices)
        return timed, Gated(grains=1, radix=16, allocation="price", **prices)

    @property
    def convention(self) -> str:  # type: ignore[override]
        kinds = {each.convention for each in self.choices}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def bits(self) -> None:
        return None

    @property
    def grains(self) -> int:  # type: ignore[override]
        return max(each.grains for each in self.choices)

    @property
    def trained(self) -> bool:  # type: ignore[override]
        return any(each.trained for each in self.choices)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        every = [s for choice in self.choices for s in choice.statistics]
        own = (*super().statistics, Products())  # about means, where the choices are not
        return tuple({each.name: each for each in (*every, *own)}.values())

    def cost(self, seen: Atoms) -> Tensor:
        """What the first choice costs at every site, [sites]."""
        return self._cost(self.choices[0], seen, self.choices[0].fit(seen).params)

    def fit(self, atoms: Atoms) -> Fit:
        fits = [each.fit(atoms).params for each in self.choices]
        costs = [self._cost(each, atoms, p) for each, p in zip(self.choices, fits, strict=True)]
        cost = torch.stack(costs, -1)
        if bool(torch.isinf(cost).all(-1).any()):
            raise InputError(
                f"coding={self.name}: a site has no choice of at most {self.timesteps} steps: give "
                "more coding.timesteps, or a choice that needs fewer"
            )
        params = {CHOICE: cost.argmin(-1).double()}
        for number, p in enumerate(fits):
            params |= {_named(name, number): value for name, value in p.items()}
        return Fit(params)

    def _cost(self, choice: Coding, atoms: Atoms, p: Params) -> Tensor:
        """Predicted loss and prices of a fitted choice at every site, infinite where it takes too long."""
        assert self.sensitivity is not None
        size = atoms.statistics[Products.name]
        curvature = atoms.statistics[self.sensitivity.name]
        loss = predicted_loss(choice.quantise, atoms, p, curvature)
        loss = loss + mean_error_loss(choice.quantise, atoms, p, curvature, widths(size))
        decoding = choice.decoding(p)
        additions = error_and_spikes(choice, atoms, p)[1] * size["macs"]
        additions = additions + size["accumulators"] * (
            decoding.acs + MULTIPLICATION * decoding.macs
        )
        cost = loss + self.mu * additions / size["macs"].sum() + self.nu * decoding.steps
        return torch.where(decoding.steps > self.timesteps, torch.inf, cost)

    def at_site(self, p: Params) -> tuple[Coding, Params]:
        number = int(p[CHOICE])
        ending = f"_{number}"
        own = {n.removesuffix(ending): t for n, t in p.items() if n.endswith(ending)}
        means = {CENTRE: p[CENTRE]} if CENTRE in p else {}
        return self.choices[number], own | means

    def encode(self, x: Tensor, p: Params) -> Spikes | SpikeTime:
        choice, own = self.at_site(p)
        return choice.encode(x, own)

    def table(self, p: Params) -> Tensor:
        """Magnitude of every code of one site."""
        choice, own = self.at_site(p)
        return choice.table(own)

    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        if p[CHOICE].dim() == 0:
            choice, own = self.at_site(p)
            return choice.quantise(x, own)
        value, count = torch.zeros(2, *x.shape, dtype=torch.float32, device=x.device)
        for choice, rows, own in self._parts(p):
            value[rows], count[rows] = choice.quantise(x[rows], own)
        return value, count

    def decoding(self, p: Params) -> Decoding:
        sums = torch.zeros(4, len(p[CHOICE]), dtype=torch.float64)
        for choice, rows, own in self._parts(p):
            part = choice.decoding(own)
            sums[:, rows] = torch.stack([part.macs, part.acs, part.comparisons, part.steps])
        return Decoding(*sums)

    def _parts(self, p: Params) -> list[tuple[Coding, Tensor, dict[str, Tensor]]]:
        """The choices that sites have, with their rows and the parameters there."""
        parts = []
        for number, choice in enumerate(self.choices):
            rows = (p[CHOICE] == number).nonzero().squeeze(-1)
            ending = f"_{number}"
            own = {n.removesuffix(ending): t[rows] for n, t in p.items() if n.endswith(ending)}
            if len(rows):
                parts.append((choice, rows, own))
        return parts


def _named(name: str, number: int) -> str:
    return f"{name}_{number}"
