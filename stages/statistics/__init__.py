"""Measurements of the dense model on calibration text, each by the class of its declaration.

A module of this package registers a function for the statistic that it measures, and is imported by
name alone, so that its code enters the keys of no other artifacts:

    @measure.register
    def saliency(statistic: Saliency, model, ids, sites, batch): ...

The module of a coding may register the function for a statistic that it alone reads.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stages.fits.statistics import Statistic
from stages.model.sites import Site

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    Measurement = Callable[[PreTrainedModel, Tensor, Sequence[Site], int], dict[str, Tensor]]


@functools.singledispatch
def measure(
    statistic: Statistic, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
) -> dict[str, Tensor]:
    """Tensors with the dimension of `sites` first, over windows ids [W, S], `batch` at a time."""
    raise NotImplementedError(
        f"nothing measures the statistic {statistic.name}: register a function for "
        f"{type(statistic).__qualname__} with @stages.statistics.measure.register"
    )


def measuring(statistic: Statistic) -> Measurement:
    """The function (model, ids, sites, batch) that measures a declared statistic, see `measure`."""
    return functools.partial(_function(statistic), statistic)


def measuring_module(statistic: Statistic) -> str:
    """The module whose code computes a statistic, for the key of its artifact."""
    return _function(statistic).__module__


def _function(statistic: Statistic) -> Callable[..., dict[str, Tensor]]:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return measure.dispatch(type(statistic))
