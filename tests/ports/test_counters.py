"""Counters per site against a plain loop over tokens, heads, positions and keys."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.codings.base import site_params
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.codings.lloyd_max import LloydMax
from stages.codings.multigrain import Multigrain
from stages.fitted import Conversion, Fit
from stages.model.sites import find_sites
from stages.neurons.spikes import decode
from stages.ports import attention, visibility
from stages.ports.counters import Counters
from stages.ports.hooks import attached
from stages.ports.patched import patched

FIELDS = ["values", "spikes", "macs", "acs"]
HEADS, GROUPS, WIDTH = 4, 2, 10
PLAIN = [[1] * 7, [1] * 7]
LEFT = [[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]]
RIGHT = [[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1, 0, 0, 0, 0, 0, 0]]


class Recorder:
    """Records what reaches a site and passes on what the stepped neuron makes of it."""

    plain = whole = False

    def __init__(self, coding=None, params=None):
        self.coding, self.params, self.seen = coding, params, []

    def __call__(self, x, real, fanout):
        self.seen.append(x)
        return self.coded(x)

    def constant(self, x):
        return None

    def tally(self, spikes, view, heads, fanout):
        assert spikes is None

    def softmax(self, scores, scaling, view):
        probs = (scores * scaling).masked_fill(~view.mask, -1e30).softmax(-1)
        self.seen.append(scores * scaling)
        return self.coded(probs), None

    def coded(self, x):
        if self.coding is None:
            return x
        return decode(self.coding.encode(x, self.params), self.coding.table(self.params))

    def spikes(self, x):
        if self.coding is None:
            return torch.full(x.shape, torch.nan)
        return self.coding.encode(x, self.params).count


class Loop:
    """Counts by hand what one forward pass of a model adds to its sites."""

    def __init__(self, model, recorders, window=None):
        self.model, self.recorders, self.window = model, recorders, window
        self.sites = find_sites(model)
        self.sums = {site.name: defaultdict(float) for site in self.sites}

    def add(self, mask, length):
        """mask: rows of 0 and 1 over all tokens so far, of which the last `length` are new."""
        for site in self.sites:
            recorder = self.recorders[site.name]
            if site.port == "probs":
                self._probs(site, recorder, mask, length)
            elif site.port == "q":
                self._queries(site, recorder, mask, length)
            elif site.port in "kv":
                self._keys(site, recorder, mask, length)
            else:
                self._rows(site, recorder, mask, length)
            recorder.seen.clear()

    def _count(self, site, spikes, fanout, new=True):
        """Spikes of some values, each of which enters `fanout` multiplications."""
        sums = self.sums[site.name]
        if new:
            sums["values"] += spikes.numel()
            sums["spikes"] += float(spikes.sum())
        sums["macs"] += spikes.numel() * fanout
        sums["acs"] += float(spikes.sum()) * fanout

    def _sees(self, row, query, key):
        near = self.window is None or query - key < self.window
        return key <= query and near and row[query] and row[key]

    def _rows(self, site, recorder, mask, length):
        (x,) = recorder.seen
        modules = dict(self.model.named_modules())
        fanout = sum(modules[name].weight.shape[0] for name in site.consumers)
        spikes = recorder.spikes(x)
        kept = x.shape[1]  # fewer than `length` in a head that computes the last logits only
        for b, row in enumerate(mask):
            for s in range(kept):
                if row[len(row) - kept + s]:
                    self._count(site, spikes[b, s], fanout)

    def _queries(self, site, recorder, mask, length):
        spikes = recorder.spikes(recorder.seen[0])
        for b, row in enumerate(mask):
            for s in range(length):
                query = len(row) - length + s
                if row[query]:
                    fanout = sum(self._sees(row, query, key) for key in range(len(row)))
                    for head in range(HEADS):
                        self._count(site, spikes[b, head, s], fanout)

    def _keys(self, site, recorder, mask, length):
        spikes = recorder.spikes(recorder.seen[0])
        for b, row in enumerate(mask):
            for key in range(len(row)):
                queries = range(len(row) - length, len(row))
                fanout = sum(self._sees(row, query, key) for query in queries)
                new = key >= len(row) - length and bool(row[key])
                for group in range(GROUPS):
                    self._count(site, spikes[b, group, key], fanout * HEADS // GROUPS, new)

    def _probs(self, site, recorder, mask, length):
        scores = [rows for block in recorder.seen for rows in block.unbind(2)]  # [B, H, K] a query
        for b, row in enumerate(mask):
            for s in range(length):
                query = len(row) - length + s
                keys = [key for key in range(len(row)) if self._sees(row, query, key)]
                for head in range(HEADS if keys else 0):
                    spikes = recorder.spikes(scores[s][b, head, keys].softmax(-1))
                    self._count(site, spikes, WIDTH)


def passes(model, ids, mask, sizes, after=None, keep=0):
    """Feeds ids piece by piece on a cache, calling `after` with the mask so far and the length."""
    cache, start = None, 0
    for size in sizes:
        stop = start + size
        seen = mask[:, :stop]
        with torch.no_grad():
            cache = model(
                ids[:, start:stop],
                attention_mask=seen,
                cache=cache,
                use_cache=True,
                logits_to_keep=keep,
            ).cache
        if after is not None:
            after(seen.tolist(), size)
        start = stop


def by_hand(model, conversion, ids, mask, sizes, **kwargs):
    """The counters of every site by the loop, in a model of stepped neurons."""
    sites, window = find_sites(model), getattr(model.config, "sliding_window", None)
    recorders = {site.name: Recorder() for site in sites}
    if conversion is not None:
        for index, name in enumerate(conversion.neurons.sites):
            params = site_params(conversion.neurons.fit.params, index)
            recorders[name] = Recorder(conversion.coding, params)
    loop = Loop(model, recorders, window)
    with attached(model, sites, recorders):
        passes(model, ids, mask, sizes, loop.add, **kwargs)
    return np.array([[loop.sums[site.name][field] for field in FIELDS] for site in sites])


def counted(model, conversion, ids, mask, sizes, **kwargs):
    counters = Counters(find_sites(model), model.device)
    with patched(model, conversion, counters):
        passes(model, ids, mask, sizes, **kwargs)
    coded = set() if conversion is None else set(conversion.neurons.sites)
    return counters.frame(coded)


def assert_counts(model, conversion, tokens, mask, sizes, **kwargs):
    mask = torch.tensor(mask)
    ids = tokens(*mask.shape, seed=5)
    frame = counted(model, conversion, ids, mask, sizes, **kwargs)
    expected = by_hand(model, conversion, ids, mask, sizes, **kwargs)
    assert list(frame["site"]) == [site.name for site in find_sites(model)]
    np.testing.assert_allclose(frame[FIELDS].to_numpy(), expected, rtol=1e-12)
    return frame


def assert_dense(model, tokens, mask):
    mask = torch.tensor(mask)
    ids = tokens(*mask.shape, seed=5)
    frame = counted(model, None, ids, mask, [7])
    expected = by_hand(model, None, ids, mask, [7])
    np.testing.assert_array_equal(frame[["values", "macs"]].to_numpy(), expected[:, [0, 2]])
    assert frame[["spikes", "acs", "error"]].isna().to_numpy().all()
    return frame


CODINGS = [
    Las("las", 4, "zero"),
    Las("las_rounded", 5, "half_step"),
    Gated("gated", 4, 2),
    Multigrain("multigrain", 4, 2, "half_step", False),
]


@pytest.mark.parametrize("mask", [PLAIN, LEFT, RIGHT], ids=["plain", "left", "right"])
@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.name)
def test_spikes_and_additions_of_real_tokens(model, tokens, convert, coding, mask):
    frame = assert_counts(model, convert(model, coding), tokens, mask, [7])
    assert (frame[["spikes", "values"]] > 0).to_numpy().all()


@pytest.mark.parametrize("sizes", [[4, 1, 1, 1], [1, 3, 2, 1]])
@pytest.mark.parametrize("mask", [PLAIN, LEFT, RIGHT], ids=["plain", "left", "right"])
def test_a_new_query_meets_cached_keys_but_counts_them_once(model, tokens, convert, mask, sizes):
    assert_counts(model, convert(model, CODINGS[2]), tokens, mask, sizes)


@pytest.mark.parametrize("mask", [PLAIN, LEFT], ids=["plain", "left"])
def test_pieces_count_what_the_whole_counts(model, tokens, mask):
    mask = torch.tensor(mask)
    ids = tokens(*mask.shape)
    whole, pieces = (counted(model, None, ids, mask, sizes) for sizes in ([7], [3, 1, 2, 1]))
    assert whole[["values", "macs"]].equals(pieces[["values", "macs"]])


def test_keys_beyond_a_sliding_window_do_not_count(tiny, tokens, convert):
    model = tiny("mistral")
    assert_counts(model, convert(model, CODINGS[2]), tokens, [[1] * 11, [0] * 2 + [1] * 9], [11])


def test_query_blocks_do_not_change_the_counts(model, tokens, convert, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 3)
    assert_counts(model, convert(model, CODINGS[1]), tokens, LEFT, [7])


def test_a_head_of_the_last_logits_counts_only_those(model, tokens, convert):
    frame = assert_counts(model, convert(model, CODINGS[1]), tokens, RIGHT, [7], keep=2)
    assert frame["values"].iloc[-1] == 24 * 2  # of the last two positions one row's are real


@pytest.mark.parametrize("mask", [PLAIN, LEFT, RIGHT], ids=["plain", "left", "right"])
def test_the_dense_model_counts_the_same_multiplications_and_no_spikes(
    model, tokens, convert, mask
):
    dense = assert_dense(model, tokens, mask)
    coded = assert_counts(model, convert(model, CODINGS[0]), tokens, mask, [7])
    assert dense[["values", "macs"]].equals(coded[["values", "macs"]])


def test_only_converted_sites_have_spikes(model, tokens, convert):
    conversion = convert(model, CODINGS[1], ("attn.k", "attn.probs", "mlp.down"))
    mask = torch.tensor(LEFT)
    ids = tokens(*mask.shape, seed=5)
    frame = counted(model, conversion, ids, mask, [7])
    coded = frame["site"].isin(conversion.neurons.sites)
    assert coded.sum() == 6
    expected = by_hand(model, conversion, ids, mask, [7])
    np.testing.assert_array_equal(frame.loc[coded, FIELDS].to_numpy(), expected[coded])
    assert frame.loc[~coded, ["spikes", "acs"]].isna().to_numpy().all()


def test_a_bound_has_no_spikes_but_counts_its_multiplications(model, tokens, convert):
    conversion = convert(model, LloydMax("lloyd_max", 3))
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    bound, dense = (counted(model, c, ids, mask, [7]) for c in (conversion, None))
    assert bound["macs"].equals(dense["macs"]) and bound["values"].equals(dense["values"])
    assert not bound["spikes"].any()


def test_masked_probabilities_do_not_spike_where_a_neuron_fires_at_zero(model, tokens, convert):
    conversion = convert(model, CODINGS[3])
    params = dict(conversion.neurons.fit.params)
    params["theta"] = params["theta"].clone()
    params["theta"][:, -1] = params["v0"] / 2  # below v0: the last step fires whatever the value
    conversion = Conversion(conversion.coding, replace(conversion.neurons, fit=Fit(params)))
    assert_counts(model, conversion, tokens, LEFT, [7])


def test_the_loop_tells_a_wrong_fan_out(model, tokens, convert, monkeypatch):
    original = visibility._visibility

    def pads_count(mask, real):
        return original(mask, None)

    conversion = convert(model, CODINGS[1])
    assert_counts(model, conversion, tokens, RIGHT, [7])
    monkeypatch.setattr(visibility, "_visibility", pads_count)
    with pytest.raises(AssertionError):
        assert_counts(model, conversion, tokens, RIGHT, [7])
