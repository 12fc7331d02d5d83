"""What batches leave apart, merged in order, is what one pass over all of them makes, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from stages.capture import Capture
from stages.codings.gated import Gated
from stages.evaluation import Likelihoods, Perplexity, perplexity
from stages.fits.sensitivity import CentredSensitivity, Sensitivity
from stages.fits.statistics import (
    CENTRED,
    ChannelMean,
    ChannelMeans,
    ChannelScale,
    ChannelScales,
    Products,
    RunningMaximum,
    Saliency,
    Smoothing,
    Statistic,
)
from stages.model.loading import load, load_offloaded
from stages.model.offload import Offload
from stages.model.perturbation import Perturbation
from stages.model.shares import Parts, Share
from stages.model.shares import save as save_part
from stages.model.sites import find_sites
from stages.patching import Patching
from stages.registry import registered
from stages.statistics import by_batch, measuring, meter

BATCH = 2


class Apart:
    """Runs the batches of ids in another order than theirs, some at a time, as several workers would."""

    def __init__(self, folder: Path, ids: Tensor, seed: int = 0, batch: int = BATCH) -> None:
        self.folder, self.parts = folder, ids.split(batch)
        order = [*range(len(self.parts))]
        random.Random(seed).shuffle(order)
        self.passes = [order[:1], order[1:]]

    def run(self, run: Callable[[Iterator[Share]], None]) -> Parts:
        self.folder.mkdir()
        for numbers in self.passes:
            run(Share(n, self.parts[n], partial(self._left, n)) for n in numbers)
        return Parts([self._folder(number) for number in range(len(self.parts))])

    def _left(self, number: int, part: dict[str, Tensor]) -> None:
        self._folder(number).mkdir()
        save_part(part, self._folder(number))

    def _folder(self, number: int) -> Path:
        return self.folder / str(number)


STATISTICS = (
    *(RunningMaximum(0.9), Saliency(), ChannelMeans()),
    *(ChannelScales(0.9), ChannelScales(0.9, CENTRED), ChannelScale(0.9)),
    *(ChannelMean(), ChannelMean(("attn.v", "mlp.down"), ChannelScale())),
    *(Sensitivity(windows=5), CentredSensitivity(windows=5)),
)
WHOLE = {Products, Smoothing}


def same(one: Perplexity, other: Perplexity) -> bool:
    frames = one.windows.equals(other.windows) and one.counters.equals(other.counters)
    return one.metrics == other.metrics and frames


def both(folder: Path, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """A model in memory, and from its files layer by layer."""
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    where = {"dtype": "float32", "device": "cpu", "revision": None}
    whole, _ = load(str(folder), device_map=None, **where)
    lazy, _ = load_offloaded(str(folder), offload=Offload("memory"), **where)
    return whole, lazy


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("lazy", [False, True], ids=["memory", "disk"])
def test_merged_parts_are_one_pass(tmp_path, tiny, tokens, convert, byte_tokenizer, kind, lazy):
    models = both(tmp_path / "model", tiny(kind), byte_tokenizer)
    whole, model = models[0], models[lazy]
    ids, sites = tokens(7, 14), find_sites(model)  # batches of 2, 2, 2 and 1 window
    apart = Apart(tmp_path / "capture", ids)
    capture = Capture(unreached="dense")
    parts = apart.run(lambda shares: capture.run_shares(model, shares, sites))
    expected, merged = capture.run(whole, ids, sites, BATCH), capture.merged(model, sites, parts)
    assert (merged.sites, merged.unreached) == (expected.sites, expected.unreached)
    for name, tensor in expected.tensors.items():
        assert torch.equal(merged.tensors[name], tensor), name
    conversion = convert(whole, Gated("gated", 4, 2))
    patching = Patching()
    parts = Apart(tmp_path / "patching", ids, 1).run(
        lambda shares: patching.run_shares(model, shares, conversion)
    )
    frame = patching.run(whole, ids, conversion, BATCH)
    assert patching.merged(model, conversion, parts).equals(frame)
    for number, own in enumerate((None, conversion)):
        likelihoods = Likelihoods(own, "text")
        parts = Apart(tmp_path / f"ppl{number}", ids, number).run(
            partial(likelihoods.run_shares, model)
        )
        assert same(
            likelihoods.merged(model, ids, parts), perplexity(whole, ids, own, BATCH, "text")
        )


def test_so_are_those_of_a_replicate(tmp_path, model, tokens, convert):
    conversion, ids = convert(model, Gated("gated", 4, 2)), tokens(5, 14)
    likelihoods = Likelihoods(conversion, "text", perturbation=Perturbation(1), counted=False)
    parts = Apart(tmp_path / "ppl", ids).run(partial(likelihoods.run_shares, model))
    merged = likelihoods.merged(model, ids, parts)
    assert same(merged, likelihoods.run(model, ids, BATCH)) and merged.counters.empty


@pytest.mark.parametrize("statistic", STATISTICS, ids=repr)
def test_so_are_those_of_a_statistic(tmp_path, model, tokens, byte_tokenizer, statistic):
    ids = tokens(7, 14)  # batches of 2, 2, 2 and 1 window, or one each
    count, batch = statistic.reads(len(ids), BATCH)
    models = both(tmp_path / "model", model, byte_tokenizer)
    for number, run in enumerate(models[:1] if statistic.whole_model else models):
        sites = find_sites(run)
        earlier = {s.name: measuring(s)(models[0], ids, sites, BATCH) for s in statistic.needs}
        whole = measuring(statistic, earlier)(models[0], ids, sites, BATCH)
        apart = Apart(tmp_path / f"parts{number}", ids[:count], 1, batch)
        parts = apart.run(meter(statistic, run, ids, sites, earlier).run_shares)
        made = meter(statistic, run, ids, sites, earlier)
        for part in parts:
            made.merge(part)
        assert save(made.tensors()) == save(whole)


def test_every_statistic_is_shared_or_known_to_be_whole():
    every = {kind for kind in registered("statistic").values() if "stages." in kind.__module__}
    assert {type(each) for each in STATISTICS} | WHOLE == every
    assert all(map(by_batch, STATISTICS))
    whole: list[Statistic] = [Products(), Smoothing(1, 1, 0.01, 0.5, 2, 16, 0.0)]
    assert not any(map(by_batch, whole)) and {type(each) for each in whole} == WHOLE


def test_sums_of_another_order_would_be_seen(tmp_path, model, tokens, convert):
    """The comparison can fail: floating-point sums of parts depend on their order."""
    conversion, ids = convert(model, Gated("gated", 4, 2)), tokens(30, 14)
    parts = Apart(tmp_path / "patching", ids).run(
        lambda shares: Patching().run_shares(model, shares, conversion)
    )
    frame = Patching().run(model, ids, conversion, BATCH)
    turned = Parts(parts.folders[::-1])
    assert not Patching().merged(model, conversion, turned).equals(frame)
