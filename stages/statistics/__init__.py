"""Measurements of the dense model on calibration text, each by the class of its declaration.

A module of this package registers a function for the statistic that it measures, and is imported by
name alone, so that its code enters the keys of no other artifacts. What adds up batch by batch has a
`Meter`, and several workers share its windows:

    @meter.register
    def saliency(statistic: Saliency, model, ids, sites, earlier) -> Meter: ...

Anything else is measured whole:

    @measure.register
    def smoothing(statistic: Smoothing, model, ids, sites, batch) -> dict[str, Tensor]: ...

The module of a coding may register the function for a statistic that it alone reads.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from stages.fits.statistics import Statistic
from stages.model.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.model.shares import Part, Share

    Measurement = Callable[[PreTrainedModel, Tensor, Sequence[Site], int], dict[str, Tensor]]

Earlier = Mapping[str, Mapping[str, Tensor]]  # what a statistic `needs`, by name


class Meter(Protocol):
    """What a statistic adds up while windows pass the model: the parts of batches, in their order."""

    def run(self, batch: int) -> None:
        """Let all windows pass and merge what their batches leave."""

    def run_shares(self, shares: Iterable[Share]) -> None:
        """Let batches pass that leave their parts by themselves, in any order."""

    def merge(self, part: Part) -> None:
        """Add what the next batch has left."""

    def tensors(self) -> dict[str, Tensor]:
        """What is measured once all parts are merged, the dimension of the sites first."""


@functools.singledispatch
def meter(
    statistic: Statistic,
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    earlier: Earlier,
) -> Meter:
    """The meter of a statistic on windows ids [W, S], which may read the tensors of `earlier` ones."""
    raise NotImplementedError(f"the statistic {statistic.name} does not add up by batches")


@functools.singledispatch
def measure(
    statistic: Statistic, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
) -> dict[str, Tensor]:
    """Tensors with the dimension of `sites` first, over windows ids [W, S], `batch` at a time."""
    raise NotImplementedError(
        f"nothing measures the statistic {statistic.name}: register a function for "
        f"{type(statistic).__qualname__} with @stages.statistics.meter.register or measure.register"
    )


def by_batch(statistic: Statistic) -> bool:
    """Whether a statistic adds up by batches of windows, which several workers may share."""
    _import_all()
    return meter.dispatch(type(statistic)) is not meter.dispatch(object)


def measuring(statistic: Statistic, earlier: Earlier | None = None) -> Measurement:
    """The function (model, ids, sites, batch) that measures a declared statistic, see `measure`.

    It measures also what the statistic needs, unless that is given as `earlier`.
    """

    def measurement(
        model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
    ) -> dict[str, Tensor]:
        if not by_batch(statistic):
            return measure(statistic, model, ids, sites, batch)
        known = earlier
        if known is None:
            known = {s.name: measuring(s)(model, ids, sites, batch) for s in statistic.needs}
        made = meter(statistic, model, ids, sites, known)
        made.run(batch)
        return made.tensors()

    return measurement


def measuring_module(statistic: Statistic) -> str:
    """The module whose code computes a statistic, for the key of its artifact."""
    function = meter if by_batch(statistic) else measure
    return function.dispatch(type(statistic)).__module__


def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
