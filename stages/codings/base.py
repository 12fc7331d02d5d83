"""The base class of all codings: what one provides, and the defaults of what few of them change."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.errors import InputError
from stages.fits.centring import SAFE, chosen
from stages.fits.sensitivity import Sensitivity, about_means
from stages.fits.statistics import CENTRED, ChannelMean, ChannelScale, Statistic
from stages.fitted import Fit
from stages.neurons.channels import CENTRE, CHANNEL, scaled_atoms
from stages.neurons.decoding import Decoding
from stages.neurons.spikes import Params, Spikes, SpikeTime

MAX_TIMESTEPS = 16
SITES_AT_ONCE = 64  # of some 300 kB each while the errors of their atoms are added up


class Coding(ABC):
    """How the neuron of a site is fitted, and what it does to a value.

    A coding is a frozen dataclass of its settings, `name` and `timesteps` among them, registered by
    `@register("coding/...")`. It defines `fit`, `encode`, `table` and `quantise`; of the attributes below
    it states those that differ from their defaults.
    """

    name: str
    timesteps: int
    grains: int = 1  # neurons (gated) or bases in time (multigrain) of an activation
    converts: bool = True  # false for `dense` alone: nothing is captured, fitted or patched
    trained: bool = False  # whether `fit` learns by gradient, and so depends on drawn samples
    neuron: bool = True  # whether the code is a spike train; bounds are quantisers without spikes
    convention: str = (
        "bit_plane"  # how spikes are counted: unary, bit_plane, digit, one_spike or none
    )
    # Whether a value's code depends on its whole token: `quantise` sees x [..., C] as the model has it,
    # [B, S, C] or [B, H, S, D], and there is no error and no spike count of a single value.
    tokenwise: bool = False
    # Whether of a token only the last dimension matters, and no channel's place.
    rowwise: bool = False
    # Widths of the integers that products multiply, where operands are integers instead of floats
    # or spikes.
    operand_bits: int | None = None
    weight_bits: int | None = None
    dense_roles: tuple[str, ...] = ()  # roles whose sites stay dense, as the authors leave them

    @property
    def decode_macs(self) -> int:
        """Multiplications per accumulator that turn step sums into a value."""
        return 0

    @property
    def gate_comparisons(self) -> int:
        """Comparisons per value that choose the neuron."""
        return 0

    @property
    def value_macs(self) -> int:
        """Multiplications per value of a site that has channels, beside those of `decode_macs`."""
        return 0

    @property
    def shares_levels(self) -> bool:
        """Whether all values of a site have the same levels, not those of their token or channel."""
        return not self.tokenwise

    @property
    def bits(self) -> float | None:
        """T + log2 of the neurons that an activation chooses from; of one spike in time log2 of the most
        codes that a site may have; None where sites have different codes."""
        choice = math.log2(self.grains) if self.gate_comparisons else 0.0
        return self.timesteps + choice

    @property
    def longest(self) -> int:
        """T of the longest neuron that a fit may choose."""
        return self.timesteps

    def at_site(self, p: Params) -> tuple[Coding, Params]:
        """The coding and the parameters of one site, where sites have different ones."""
        return self, p

    def decoding(self, p: Params) -> Decoding:
        """What decoding costs at every site of fitted parameters, which have the sites in front."""
        sites = next(iter(p.values())).shape[:1]
        costs = (self.decode_macs, 0, self.gate_comparisons, self.timesteps)
        return Decoding(*(torch.full(sites, cost, dtype=torch.float64) for cost in costs))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What `fit` reads in `Atoms.statistics[name]` beyond the distribution."""
        return ()

    @property
    def replaces_softmax(self) -> bool:
        """Whether it defines `softmax`, from which attention probabilities then come."""
        return type(self).softmax is not Coding.softmax

    @property
    def softmax_in_steps(self) -> bool:
        """Whether it defines `softmax_spikes`, for execution step by step."""
        return type(self).softmax_spikes is not Coding.softmax_spikes

    def choose(self, atoms: Atoms) -> Atoms:
        """The same sites, with statistics that say where an option of the coding is on."""
        return atoms

    def seen(self, atoms: Atoms) -> Atoms:
        """The distribution of what the neurons see, of sites with this distribution."""
        return atoms

    def scales(self, atoms: Atoms) -> dict[str, Tensor]:
        """Parameters that say in which units a neuron sees its site, beside those of `fit`."""
        return {}

    @abstractmethod
    def fit(self, atoms: Atoms) -> Fit:
        """Fit all sites of `atoms`, which are `seen`, as one batched problem."""

    @abstractmethod
    def encode(self, x: Tensor, p: Params) -> Spikes | SpikeTime:
        """The time-stepped neuron of one site on x."""

    @abstractmethod
    def table(self, p: Params) -> Tensor:
        """Magnitude of every code in float32, [*S, codes]."""

    @abstractmethod
    def quantise(self, x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Value (float32) and spikes of every x in one pass."""

    def softmax(
        self, scores: Tensor, scaling: float, mask: Tensor, p: Params
    ) -> tuple[Tensor, Tensor]:
        """Probabilities (float32) and spikes of scores [B, H, Q, K], zero where mask forbids.

        A coding without it codes the probabilities of the model.
        """
        raise NotImplementedError(f"{self.name} defines no softmax")

    def softmax_spikes(
        self, scores: Tensor, scaling: float, mask: Tensor, p: Params
    ) -> tuple[SpikeTime, Tensor, Tensor]:
        """The same as spikes: when each key fires, the weight of every step [T], and what scales the
        sum of each row [B, H, Q, 1]."""
        raise InputError(f"coding={self.name} has no softmax in steps: use runtime.execution=fast")


GRANULARITIES = ("site", "channel")
CENTRES = ("none", "channel")


@dataclass(frozen=True)
class Scaled(Coding):
    """A coding of sign and magnitude whose neurons may see each channel in units of its scale.

    `granularity` channel: the code works on x / s of the channel and its value is multiplied by s, the
    `quantile` of the channel's |x| over calibration (1: the maximum). A channel is a feature, in q, k
    and v a head's dimension; probabilities have none and stay a site. Neurons are fitted to the
    distribution of x / s, errors weighing s^2. A spike of a linear layer's input then adds s W instead
    of W, with one s a row, and costs no more if that is stored; where nothing can store it, in q and k,
    it is one multiplication of a value. Counted is one of every value of a site with channels.
    `granularity` site: the `quantile` of the site's |x| takes the place of its largest.

    `centre` channel: the code works on x - m with m the mean of the channel over calibration, and the
    means, a constant input current, are left out of its spikes. It is so where that costs nothing a
    product: W m is a bias of a linear layer, m of k shifts all scores of a query alike, and m of v is
    added once, as probabilities sum to one. Of those roles (`stages.fits.statistics.CENTRED`) a coding
    with a sensitivity centres the sites where the predicted loss is lower for it, any other the roles
    of `stages.fits.centring.SAFE`. With `granularity` channel the code works on (x - m) / s.
    """

    granularity: str = field(default="site", kw_only=True)
    quantile: float = field(default=1.0, kw_only=True)
    centre: str = field(default="none", kw_only=True)

    def check_scale(self) -> None:
        """Raise InputError unless scale and centre are ones that there are."""
        if self.centre not in CENTRES:
            raise InputError(
                f"coding.centre={self.centre!r} for {self.name}: choose {' or '.join(CENTRES)}"
            )
        if self.granularity not in GRANULARITIES:
            raise InputError(
                f"coding.granularity={self.granularity!r} for {self.name}: choose "
                f"{' or '.join(GRANULARITIES)}"
            )
        if not 0.5 <= self.quantile <= 1:
            raise InputError(
                f"coding.quantile={self.quantile} for {self.name}: give 0.5 to 1, the largest value"
            )

    @property
    def channels(self) -> bool:
        """Whether every channel has its scale."""
        return self.granularity == "channel"

    @property
    def centred(self) -> bool:
        """Whether values are coded about the means of their channels."""
        return self.centre == "channel"

    @property
    def centred_roles(self) -> tuple[str, ...]:
        """Roles whose means are measured."""
        return SAFE

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        scale = ChannelScale(self.quantile) if self.channels else None
        if self.centred:
            return (ChannelMean(self.centred_roles, scale),)
        return () if scale is None else (scale,)

    @property
    def value_macs(self) -> int:
        return int(self.channels)

    @property
    def shares_levels(self) -> bool:
        return not (self.channels or self.centred)

    def seen(self, atoms: Atoms) -> Atoms:
        if not (self.channels or self.centred):
            return atoms
        seen = scaled_atoms(atoms, self._measured(atoms))
        return replace(seen, square=atoms.power()) if self.centred else seen

    def scales(self, atoms: Atoms) -> dict[str, Tensor]:
        scale = {CHANNEL: self._measured(atoms)["scale"]} if self.channels else {}
        return scale | ({CENTRE: self._measured(atoms)["mean"]} if self.centred else {})

    def largest(self, atoms: Atoms) -> Tensor:
        """Where the range of a site's neuron ends, in units of what it sees, [sites] float64."""
        site = atoms.maximum if self.quantile == 1 else atoms.quantile(self.quantile)
        site = torch.where(site > 0, site, atoms.maximum)  # a site that is zero almost everywhere
        if not self.channels:
            return site
        return torch.where(self._measured(atoms)["channels"] > 0, 1.0, site)

    def _measured(self, atoms: Atoms) -> Mapping[str, Tensor]:
        """The statistic that has scales and means."""
        return atoms.statistics[ChannelMean.name if self.centred else ChannelScale.name]


class Sensitive(Scaled):
    """A coding whose fit, if it has a `sensitivity`, weighs errors by what they cost the model."""

    sensitivity: Sensitivity | None = None

    def check_sensitivity(self, searched: str) -> None:
        """Raise InputError where scale and sensitivity do not go together; a fit finds `searched`."""
        self.check_scale()
        if self.quantile < 1 and not self.channels:
            raise InputError(
                f"coding.quantile={self.quantile} for {self.name}, whose {searched} are searched: give 1, "
                "or coding.granularity=channel"
            )
        if self.sensitivity is not None and self.channels:
            raise InputError(
                f"coding.granularity=channel for {self.name} with a sensitivity, which is measured by "
                "magnitude: give coding.sensitivity=null, or coding.granularity=site"
            )

    @abstractmethod
    def cost(self, seen: Atoms) -> Tensor:
        """Predicted loss and prices of every site as the neurons see it, [sites]."""

    @property
    def centred_roles(self) -> tuple[str, ...]:
        return super().centred_roles if self.sensitivity is None else CENTRED

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        if self.sensitivity is None:
            return super().statistics
        return (*super().statistics, about_means(self.sensitivity, self.centred))

    def choose(self, atoms: Atoms) -> Atoms:
        """Centre the sites whose predicted loss and prices are lower for it."""
        if self.sensitivity is None or not self.centred:
            return atoms
        return chosen(atoms, self.sensitivity.name, lambda choice: self.cost(self.seen(choice)))


def check_timesteps(name: str, timesteps: int, least: int = 1, most: int = MAX_TIMESTEPS) -> None:
    """Raise InputError unless `least` <= T <= `most`."""
    if not isinstance(timesteps, int) or not least <= timesteps <= most:
        raise InputError(
            f"coding.timesteps={timesteps!r} for {name}: give a whole number from {least} to {most}"
        )


def check_prices(name: str, **prices: float) -> None:
    """Raise InputError unless every price is a finite number, 0 or more."""
    for option, price in prices.items():
        number = isinstance(price, int | float) and not isinstance(price, bool)
        if not number or not 0 <= price < math.inf:
            raise InputError(
                f"coding.{option}={price!r} for {name}: give a finite number, 0 or more"
            )


def half_step(timesteps: int, v0: str, name: str) -> float:
    """The initial potential of a base-2 neuron: 0, or half of its last step, 2^-(T+1)."""
    if v0 not in ("zero", "half_step"):
        raise InputError(f"coding.v0={v0!r} for {name}: choose zero or half_step")
    return 0.0 if v0 == "zero" else 2.0 ** -(timesteps + 1)


def site_params(params: Params, index: int) -> dict[str, Tensor]:
    """The parameters of one site; means that are zero, of a site that is not centred, are none."""
    row = {name: value[index] for name, value in params.items()}
    if CENTRE in row and not bool(row[CENTRE].any()):
        del row[CENTRE]
    return row


def error_and_spikes(coding: Coding, atoms: Atoms, params: Params) -> tuple[Tensor, Tensor]:
    """Expected squared error and spikes of one value of every site over its atoms, which the neurons
    see, [S] float64; NaN where they depend on the whole token."""
    sites = torch.arange(len(atoms.maximum))
    if coding.tokenwise:
        unknown = torch.full(sites.shape, torch.nan, dtype=torch.float64)
        return unknown, unknown
    parts = []
    for index in sites.split(SITES_AT_ONCE):
        part = atoms.rows(index)
        x, weight = part.signed_points()
        rows = {name: value[index].float() for name, value in params.items()}
        value, count = coding.quantise(x.float(), rows)
        error = ((value.double() - x) ** 2 * weight * part.gains(x)).sum(-1)
        parts.append((error, (count.double() * weight).sum(-1)))
    errors, spikes = zip(*parts, strict=True)
    return torch.cat(errors), torch.cat(spikes)


def squared_error(coding: Coding, atoms: Atoms, params: Params) -> Tensor:
    """Expected squared error of every site over its atoms, [S] float64."""
    return error_and_spikes(coding, atoms, params)[0]
