"""How much an error at a site costs the model: the curvature of its loss, by site and by magnitude."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from stages.atoms import Atoms
from stages.errors import InputError
from stages.fits.statistics import ChannelMeans, Statistic
from stages.neurons.spikes import Params
from stages.registry import register

CELLS_PER_OCTAVE = 4
LOWEST_OCTAVE = -40
CELLS = 64 * CELLS_PER_OCTAVE
PRIOR = 16.0


def cell(x: Tensor) -> Tensor:
    """The cell of |x|, a quarter of an octave wide from 2^-40 on, below and zero the first."""
    place = (x.abs().clamp(min=2.0**LOWEST_OCTAVE).log2() - LOWEST_OCTAVE) * CELLS_PER_OCTAVE
    return place.long().clamp(0, CELLS - 1)


@register("statistic/sensitivity", 2, was="stages.llm.sensitivity.Sensitivity", oldest=1)
@dataclass(frozen=True)
class Sensitivity(Statistic):
    """The diagonal of the Fisher information at every site, over the first `windows` windows.

    An error e at a value adds f e^2 / 2 to KL(dense || spiking), where f is the expected squared
    derivative of log p(y) for y drawn from the model itself: one backward pass tells all sites. At every
    token of a window one y is drawn, by a generator of the window alone (numpy's `SeedSequence` of `seed`
    and its number), so that it matters neither where nor after which other the window passes. Values of
    one magnitude share one f. Source: Fisher information as the second-order term of KL (Amari 1998; used
    for bit allocation by HAWQ, Dong et al. 2019).

    Version 1 drew all windows in turn from one generator.
    """

    name: str = "sensitivity"
    windows: int = 4
    seed: int = 0

    whole_model = True

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise InputError(f"sensitivity: windows={self.windows}: give at least 1")
        if self.seed < 0:
            raise InputError(f"sensitivity: seed={self.seed}: give 0 or more")

    @property
    def least_windows(self) -> int:
        return self.windows

    def reads(self, windows: int, batch: int) -> tuple[int, int]:
        return self.windows, 1


@register("statistic/centred_sensitivity", 2, oldest=1)
@dataclass(frozen=True)
class CentredSensitivity(Sensitivity):
    """The same by magnitude of x - m, m the mean of the value's channel (`ChannelMeans`), and by that of x
    beside it: for codings that work on x - m where it pays."""

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (ChannelMeans(),)


def about_means(declared: Sensitivity, centred: bool) -> Sensitivity:
    """The sensitivity as a coding reads it, by magnitude of what its neurons see."""
    return CentredSensitivity(**vars(declared)) if centred else declared


def curvature(statistic: Mapping[str, Tensor]) -> Tensor:
    """Mean f of a value by cell of its magnitude, [S, CELLS]; a cell of few values leans on the
    mean of its site, as if it held `PRIOR` values more of that mean."""
    total, count = statistic["total"], statistic["count"]
    mean = total.sum(-1, keepdim=True) / count.sum(-1, keepdim=True)
    return (total + PRIOR * mean) / (count + PRIOR)


def loss_weight(statistic: Mapping[str, Tensor], atoms: Atoms) -> Tensor:
    """What a squared error of one at every atom adds to the loss, in nats a token, [S, K]."""
    f = curvature(statistic).gather(-1, cell(atoms.value))
    values = statistic["count"].sum(-1) / statistic["tokens"]
    return atoms.weight * f / 2 * values[:, None]


def predicted_loss(
    quantise: Callable[[Tensor, Params], tuple[Tensor, Tensor]],
    atoms: Atoms,
    params: Params,
    statistic: Mapping[str, Tensor],
) -> Tensor:
    """KL(dense || spiking) a token that the error of each site alone adds, to second order, [S]."""
    x, weight = atoms.points()
    value, _ = quantise(x.float(), {name: t.float() for name, t in params.items()})
    f = curvature(statistic).gather(-1, cell(x))
    per_value = ((value.double() - x) ** 2 * f * weight).sum(-1) / 2
    return per_value * statistic["count"].sum(-1) / statistic["tokens"]


def mean_error_loss(
    quantise: Callable[[Tensor, Params], tuple[Tensor, Tensor]],
    atoms: Atoms,
    params: Params,
    statistic: Mapping[str, Tensor],
    width: Tensor,
) -> Tensor:
    """What the mean error of a site adds to its predicted loss in a product that is `width` [S] wide, [S].

    `predicted_loss` takes errors for independent, so that their squares add up. Their mean adds up by
    itself: w of them cost w times the square of the mean more a value. It matters where values have one
    sign: a code that silences small probabilities leaves out a part of every row.
    """
    x, weight = atoms.signed_points()
    value, _ = quantise(x.float(), {name: t.float() for name, t in params.items()})
    mean = ((value.double() - x) * weight).sum(-1)
    return loss_weight(statistic, atoms).sum(-1) * width * mean**2
