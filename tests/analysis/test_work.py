"""The work of a window, counted by hand on a model of two layers."""

from stages.analysis.operations import operations
from stages.analysis.work import Work, work
from stages.model.sites import SiteSelection, find_sites, select

# Of `tests.conftest.TINY`: 24 wide, 40 inside, 4 heads of 10 on 2 of keys, 50 tokens, 2 layers.
LINEAR = 24 * 40 + 2 * 24 * 20 + 40 * 24 + 3 * 24 * 40
PAIRS = 8 * 9 // 2  # of 8 tokens, each of which sees itself and those before it


def test_a_window_is_counted_by_hand(model):
    sites = find_sites(model)
    plan = operations(model, sites)
    layer = 8 * LINEAR + PAIRS * 2 * 4 * 10
    # two norms, RoPE of queries and keys, activation, product, two residuals; the softmax
    steps = 8 * (2 * 24 + 6 * 10 + 2 * 40 + 2 * 24) + 4 * PAIRS
    values = 8 * (2 * 24 + 40 + 2 * 20 + 40 + 3 * 40) + 4 * PAIRS
    norm = 8 * 24
    whole = Work(2 * layer + 8 * 24 * 50, 2 * steps + norm, 2 * values + 8 * 24)
    assert work(plan, sites, 8) == whole
    last = Work(2 * layer + 24 * 50, 2 * steps + norm, 2 * values + 24)
    assert work(plan, sites, 8, logits=1) == last


def test_values_are_those_of_the_chosen_sites(model):
    sites = find_sites(model)
    some = select(sites, SiteSelection(("mlp.down", "attn.probs")))
    plan = operations(model, sites)
    assert work(plan, some, 8).values == 2 * (8 * 40 + 4 * PAIRS)
    assert work(plan, some, 8).macs == work(plan, sites, 8).macs
