"""How far a perplexity or an accuracy can be believed: standard error, spread, ratio with interval.

Two sources of chance are kept apart. The text: another sample of windows, or of questions, would give
another number (standard errors and intervals). The last bits: the same sample gives another number
where sums are rounded otherwise (the spread over replicates).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LARGEST = 700.0  # nats: exp of more is no float64
_DRAWN = 2_000_000  # resampled values that are in memory at once


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made (Efron & Tibshirani 1993, ch. 13): quantiles of resampled statistics.

    Percentiles, as they are defined for ties and for two windows too, where BCa's correction is 0/0,
    and as the interval of exp(x) is exp of that of x. With few windows they are too narrow, as the
    resamples' variance is (W - 1)/W of what it should be: about 90 % instead of 95 % at W = 8.
    """

    resamples: int = 9999
    seed: int = 0
    method: Literal["percentile", "basic", "bca"] = "percentile"
    confidence: float = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error over the sample and its standard deviation over replicates; None
    where one element is all there is, or where it is not finite."""

    value: float
    se: float | None
    spread: float | None


@dataclass(frozen=True)
class Ratio:
    """A number over the dense model's, and the ends of its interval; None where they have no meaning."""

    value: float | None
    low: float | None = None
    high: float | None = None


def perplexity(nll: Array) -> Estimate:
    """exp of the mean of nll [R, W], nats a token of every replicate and window; inf if diverged.

    The mean over replicates is the geometric mean of their perplexities. Standard error by the delta
    method: ppl · sd of the windows' means / sqrt(W). Spread: sd of the replicates' perplexities.
    """
    means = nll.mean(0)
    value = exp(float(means.mean()))
    if math.isinf(value):
        return Estimate(value, None, None)
    error = _standard_error(means)
    replicates = [exp(float(mean)) for mean in nll.mean(1)]
    return Estimate(value, None if error is None else value * error, _deviation(replicates))


def perplexity_ratio(nll: Array, dense: Array, how: Bootstrap) -> Ratio:
    """exp of the mean difference to the dense model's nll, both [R, W], paired window by window.

    A ratio is inf where the model alone has diverged, None where the dense one has.
    """
    ours, theirs = nll.mean(0), dense.mean(0)
    if math.isinf(exp(float(theirs.mean()))):
        return Ratio(None)
    if math.isinf(exp(float(ours.mean()))):
        return Ratio(math.inf)
    value = exp(float((ours - theirs).mean()))

    def statistic(ours: Array, theirs: Array, axis: int = -1) -> Array:
        return np.asarray(np.exp((ours - theirs).mean(axis)))

    return Ratio(value, *_interval((ours, theirs), statistic, how))


def accuracy(correct: Array) -> Estimate:
    """The mean of correct [R, N], 1 where a replicate answers a question rightly, else 0.

    Standard error: sd of the questions' means / sqrt(N). Spread: sd of the replicates' accuracies.
    """
    questions = correct.mean(0)
    return Estimate(
        float(questions.mean()), _standard_error(questions), _deviation(correct.mean(1))
    )


def accuracy_ratio(correct: Array, dense: Array, how: Bootstrap) -> Ratio:
    """Accuracy over the dense model's, both [R, N], paired question by question; None where the dense
    model has no answer right."""
    ours, theirs = correct.mean(0), dense.mean(0)
    if not theirs.any():
        return Ratio(None)

    def statistic(ours: Array, theirs: Array, axis: int = -1) -> Array:
        return np.asarray(ours.mean(axis) / theirs.mean(axis))

    return Ratio(float(ours.mean() / theirs.mean()), *_interval((ours, theirs), statistic, how))


def changed(chosen: Array, dense: Array) -> float:
    """The share of answers [R, N] that are not the dense model's under the same perturbation."""
    return float((chosen != dense).mean())


def exp(nats: float) -> float:
    """exp, and inf for what has diverged: nan, inf, and more than a float holds."""
    return math.exp(nats) if nats < LARGEST else math.inf


def _standard_error(sample: Array) -> float | None:
    """Of the mean of a sample [N]."""
    deviation = _deviation(sample)
    return None if deviation is None else deviation / math.sqrt(len(sample))


def _deviation(values: Any) -> float | None:
    """The standard deviation of values [N]; exactly 0 where all are the same."""
    values = np.asarray(values, float)
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return float((values - values[0]).std(ddof=1))


def _interval(
    sample: tuple[Array, Array], statistic: Callable[..., Array], how: Bootstrap
) -> tuple[float, float] | tuple[None, None]:
    """The interval of a paired statistic of two samples [N]; none of one element, or where resamples
    have no finite statistic."""
    from scipy.stats import DegenerateDataWarning, bootstrap

    size = len(sample[0])
    if size < 2:
        return None, None
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # A resample in which the dense model has no answer right: its interval is refused below.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            sample,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=how.resamples,
            batch=max(1, _DRAWN // size),
            confidence_level=how.confidence,
            method=how.method,
            rng=np.random.default_rng(how.seed),
        )
    ends = found.confidence_interval
    if not (math.isfinite(ends.low) and math.isfinite(ends.high)):
        return None, None
    return float(ends.low), float(ends.high)
