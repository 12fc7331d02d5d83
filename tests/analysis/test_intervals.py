"""Errors against closed forms, exhaustive resampling and their coverage in simulation."""

import itertools
import math
import statistics
import warnings

import numpy as np
import pytest

from stages.analysis.intervals import (
    Bootstrap,
    Estimate,
    Ratio,
    accuracy,
    accuracy_ratio,
    changed,
    perplexity,
    perplexity_ratio,
)

HOW = Bootstrap()


@pytest.fixture(autouse=True)
def no_warnings():
    """A warning on the console is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def text(replicates, windows, seed=0):
    """Nats a token [R, W] of a model, and of the dense one."""
    draw = np.random.default_rng(seed)
    dense = draw.normal(3, 0.3, windows) + draw.normal(0, 1e-4, (replicates, windows))
    return dense + draw.normal(0.02, 0.03, windows) + draw.normal(0, 0.01, dense.shape), dense


def test_a_perplexity_is_the_geometric_mean_with_the_error_of_its_windows():
    nll, _ = text(3, 20)
    found = perplexity(nll)
    means = [statistics.fmean(column) for column in nll.T]
    replicates = [math.exp(statistics.fmean(row)) for row in nll]
    assert found.value == pytest.approx(statistics.geometric_mean(replicates))
    assert found.se == pytest.approx(found.value * statistics.stdev(means) / math.sqrt(20))
    assert found.spread == pytest.approx(statistics.stdev(replicates))


def test_the_delta_method_is_the_error_of_many_samples():
    draw = np.random.default_rng(0)
    samples = [perplexity(draw.normal(3, 0.3, (1, 64))) for _ in range(2000)]
    true = statistics.stdev(each.value for each in samples)
    assert statistics.fmean(each.se for each in samples) == pytest.approx(true, rel=0.05)


def test_a_ratio_is_that_of_the_perplexities_and_paired():
    nll, dense = text(2, 64)
    found = perplexity_ratio(nll, dense, HOW)
    assert found.value == pytest.approx(perplexity(nll).value / perplexity(dense).value, rel=1e-12)
    logs = (nll - dense).mean(0)
    error = statistics.stdev(logs) / 8
    assert math.log(found.low) == pytest.approx(logs.mean() - 1.96 * error, abs=0.15 * error)
    assert math.log(found.high) == pytest.approx(logs.mean() + 1.96 * error, abs=0.15 * error)
    apart = perplexity_ratio(nll, dense[:, ::-1], HOW)  # the same numbers, paired wrongly
    assert apart.value == pytest.approx(found.value)
    assert apart.high - apart.low > 5 * (found.high - found.low)


def test_an_interval_of_few_windows_is_that_of_every_resample():
    nll, dense = text(1, 4)
    logs = (nll - dense)[0]
    every = sorted(math.exp(statistics.fmean(each)) for each in itertools.product(logs, repeat=4))
    found = perplexity_ratio(nll, dense, HOW)
    assert found.low == pytest.approx(np.quantile(every, 0.025), rel=2e-3)
    assert found.high == pytest.approx(np.quantile(every, 0.975), rel=2e-3)
    many = text(1, 30)
    assert perplexity_ratio(*many, HOW) == perplexity_ratio(*many, HOW)
    assert perplexity_ratio(*many, HOW) != perplexity_ratio(*many, Bootstrap(seed=1))


@pytest.mark.parametrize(("windows", "least"), [(64, 0.92), (8, 0.86)])
def test_an_interval_covers_the_true_ratio_about_as_often_as_it_says(windows, least):
    how, covered = Bootstrap(resamples=999), 0
    for seed in range(400):
        nll, dense = text(1, windows, seed)
        found = perplexity_ratio(nll, dense, how)
        covered += found.low <= math.exp(0.02) <= found.high
    assert least < covered / 400 < 0.975


def test_few_or_equal_windows_give_numbers_or_none():
    nll, dense = text(1, 2)
    two = perplexity_ratio(nll, dense, HOW)
    assert two.low < two.value < two.high
    one = perplexity_ratio(nll[:, :1], dense[:, :1], HOW)
    assert one.value == pytest.approx(math.exp(nll[0, 0] - dense[0, 0]))
    assert one.low is one.high is None and perplexity(nll[:, :1]).se is None
    assert perplexity_ratio(dense, dense, HOW) == Ratio(1.0, 1.0, 1.0)
    same = perplexity(np.full((3, 5), 1.1))
    assert (same.se, same.spread) == (0, 0) and same.value == pytest.approx(math.exp(1.1))


@pytest.mark.parametrize("broken", [math.inf, math.nan, 1e4])
def test_what_has_diverged_has_no_error(broken):
    nll, dense = text(2, 4)
    bad = nll.copy()
    bad[0, 1] = broken
    assert perplexity(bad) == Estimate(math.inf, None, None)
    assert perplexity_ratio(bad, dense, HOW) == Ratio(math.inf)
    assert perplexity_ratio(nll, bad, HOW) == Ratio(None) == perplexity_ratio(bad, bad, HOW)


def answers(replicates, questions, share, seed=0):
    draw = np.random.default_rng(seed)
    return (draw.random((replicates, questions)) < share).astype(float)


def test_an_accuracy_has_the_error_of_its_questions():
    correct = answers(1, 200, 0.6)
    found, p = accuracy(correct), correct.mean()
    assert found.value == p and found.spread is None
    assert found.se == pytest.approx(math.sqrt(p * (1 - p) / 199))
    three = accuracy(np.stack([correct[0], correct[0], 1 - correct[0]]))
    assert three.value == pytest.approx((2 * p + 1 - p) / 3)
    assert three.spread == pytest.approx(statistics.stdev([p, p, 1 - p]))
    assert accuracy(correct[:, :1]).se is None


def test_a_ratio_of_accuracies_is_paired_question_by_question():
    dense = answers(1, 300, 0.6)
    ours = dense.copy()
    ours[0, :9] = 1 - ours[0, :9]
    found = accuracy_ratio(ours, dense, HOW)
    assert found.value == pytest.approx(ours.sum() / dense.sum())
    assert found.low < found.value < found.high
    apart = accuracy_ratio(ours[:, ::-1], dense, HOW)
    assert apart.high - apart.low > 3 * (found.high - found.low)
    assert accuracy_ratio(dense, dense, HOW) == Ratio(1.0, 1.0, 1.0)
    one = accuracy_ratio(np.ones((1, 1)), np.ones((1, 1)), HOW)
    assert one == Ratio(1.0, None, None)


def test_an_accuracy_over_nothing_is_no_ratio():
    none, few = np.zeros((1, 5)), np.eye(5)[:1]
    assert accuracy_ratio(few, none, HOW) == Ratio(None)
    assert accuracy_ratio(none, few, HOW).value == 0
    found = accuracy_ratio(1 - few, few, HOW)  # one resample in three has no right answer
    assert (found.value, found.low, found.high) == (4, None, None)


def test_changed_answers_are_counted_under_the_same_perturbation():
    ours = np.array([[0, 1, 2, 3], [0, 1, 2, 2]])
    theirs = np.array([[0, 1, 2, 2], [0, 1, 2, 3]])
    assert changed(ours, theirs) == 2 / 8 and changed(ours, ours) == 0
