"""A model whose layers stay on disk computes what it computes in memory, a layer after the other."""

from __future__ import annotations

import copy
import gc
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from stages.capture import Capture
from stages.codings.gated import Gated
from stages.errors import InputError
from stages.evaluation import accuracy, perplexity
from stages.fits.sensitivity import Sensitivity
from stages.fits.statistics import ChannelMean, ChannelScale, RunningMaximum, Saliency, Smoothing
from stages.model import forward
from stages.model.loading import load, load_offloaded
from stages.model.offload import Offload, Weights, device_of, offloaded
from stages.model.sites import find_sites
from stages.patching import Patching
from stages.ports.hooks import stream
from stages.statistics import measuring
from stages.transforms.prefix import PeakPort
from stages.transforms.rotation import rotate
from tests.conftest import FAMILIES

KINDS = tuple(FAMILIES)
CODING = Gated("gated", 4, 2)
WHERE = {"device": "cpu", "revision": None}


@pytest.fixture
def saved(tmp_path, tiny, byte_tokenizer) -> Callable[..., Path]:
    """Saves a tiny model of a kind, in shards of 10 kB: some layers are cut in two."""

    def save(kind: str = "llama", shards: str = "10KB", tied: bool = False) -> Path:
        folder, made = tmp_path / f"{kind}-{shards}-{tied}", tiny(kind)
        if tied:
            made.config.tie_word_embeddings = True
            made.tie_weights()
        made.save_pretrained(folder, max_shard_size=shards)
        byte_tokenizer.save_pretrained(folder)
        return folder

    return save


def both(
    folder: Path, boundary: str = "memory", dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedModel]:
    whole, _ = load(str(folder), dtype=dtype, device_map=None, **WHERE)
    lazy, _ = load_offloaded(str(folder), dtype=dtype, offload=Offload(boundary), **WHERE)
    return whole, lazy


def sketches(model: PreTrainedModel, ids: Tensor, batch: int = 2) -> dict[str, Tensor]:
    return Capture().run(model, ids, find_sites(model), batch).tensors


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal to the bit, where NaN is what NaN is."""
    pairs = [(one[name], other[name]) for name in one]
    return set(one) == set(other) and all(
        torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)) for a, b in pairs
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shards", "tied", "boundary", "dtype"),
    [("10KB", False, "memory", "float32"), ("1GB", True, "disk", "bfloat16")],
    ids=["sharded", "tied"],
)
def test_it_computes_what_the_model_in_memory_does(
    kind, shards, tied, boundary, dtype, saved, tokens, convert
):
    folder = saved(kind, shards, tied)
    assert len(list(folder.glob("*.safetensors"))) > 1 or shards == "1GB"
    whole, lazy = both(folder, boundary, dtype)
    ids = tokens(5, 14)  # batches of 2, 2 and 1 window
    assert same(sketches(whole, ids), sketches(lazy, ids))
    conversion = convert(whole, CODING)
    for own in (None, conversion):
        found = [perplexity(model, ids, own, 2, "text") for model in (whole, lazy)]
        assert found[0].metrics == found[1].metrics
        assert found[0].counters.equals(found[1].counters)
    frames = [Patching().run(model, ids, conversion, 2) for model in (whole, lazy)]
    assert frames[0].equals(frames[1])


def test_float32_from_a_bfloat16_checkpoint_is_that_of_the_whole_model(saved, tokens):
    folder = saved()
    for file in folder.glob("*.safetensors"):
        small = {name: weight.bfloat16() for name, weight in load_file(file).items()}
        save_file(small, file, metadata={"format": "pt"})
    whole, lazy = both(folder)
    assert same(sketches(whole, tokens(3, 9)), sketches(lazy, tokens(3, 9)))


def test_a_model_that_accelerate_keeps_on_disk_is_measured_alike(saved, tokens, convert, tmp_path):
    whole, _ = both(saved())
    places = {"model": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = copy.deepcopy(whole)
    dispatch_model(spread, places, main_device="cpu", offload_dir=str(tmp_path / "spread"))
    assert spread.device.type == "meta" and device_of(spread).type == "cpu"
    ids, conversion = tokens(3, 14), convert(whole, CODING)
    assert same(sketches(whole, ids), sketches(spread, ids))
    frames = [Patching().run(model, ids, conversion, 2) for model in (whole, spread)]
    assert frames[0].equals(frames[1])
    found = [perplexity(model, ids, conversion, 2, "text") for model in (whole, spread)]
    assert found[0].metrics == found[1].metrics and found[0].counters.equals(found[1].counters)


@pytest.mark.parametrize(
    "statistic",
    [RunningMaximum(0.9), Saliency(), ChannelScale(0.9), ChannelMean()],
    ids=lambda s: s.name,
)
def test_statistics_are_the_same(statistic, saved, tokens):
    found = [measuring(statistic)(m, tokens(5, 12), find_sites(m), 2) for m in both(saved())]
    assert same(*found)


def test_a_search_that_reads_one_position_of_the_head_sees_every_token(saved, tokens):
    peaks = []
    for model in both(saved()):
        ports = {s.name: PeakPort() for s in find_sites(model) if s.role == "mlp.down"}
        stream(model, tokens(5, 9), 2, ports, "peaks", logits=1)
        peaks.append(torch.stack([port.peaks for port in ports.values()]))
    assert torch.equal(*peaks) and peaks[0].shape == (2, 5, 9)


def resident_layers(model: PreTrainedModel) -> list[int]:
    weights = {n: p for n, p in model.named_parameters() if not p.is_meta}
    return sorted({int(n.split(".")[2]) for n in weights if ".layers." in n})


def test_two_layers_are_resident_at_most_and_none_afterwards(saved, tokens):
    _, lazy = both(saved())
    seen: list[tuple[int, bool]] = []

    def note(index: int) -> Callable[..., None]:
        def look(*_: object) -> None:
            mine = {*resident_layers(lazy)} - {index + 1}  # which is being read
            seen.append((index, mine == ({index} if index >= 0 else set())))

        return look

    handles = [
        layer.mlp.register_forward_hook(note(i)) for i, layer in enumerate(lazy.model.layers)
    ]
    handles.append(lazy.lm_head.register_forward_hook(note(-1)))
    perplexity(lazy, tokens(4, 9), None, 2, "text")
    for handle in handles:
        handle.remove()
    assert seen == [(index, True) for index in (0, 1, -1) for _ in range(2)]  # two batches
    assert all(parameter.is_meta for parameter in lazy.parameters())
    assert not [layer for layer in lazy.model.layers if "forward" in vars(layer)]


def test_the_next_layer_is_read_while_one_computes(saved, tokens):
    _, lazy = both(saved())

    def wait(*_: object) -> None:
        end = time.monotonic() + 30
        while 1 not in resident_layers(lazy):
            assert time.monotonic() < end
            time.sleep(0.001)

    lazy.model.layers[0].mlp.register_forward_hook(wait)
    assert perplexity(lazy, tokens(2, 9), None, 2, "text").metrics["nll"] > 0


def readers() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("weights")]


def test_a_layer_that_fails_leaves_no_weights_and_no_reader_behind(saved, tokens):
    _, lazy = both(saved())

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for layer in lazy.model.layers:  # with another one being read, and with the head
        handle = layer.mlp.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            perplexity(lazy, tokens(2, 9), None, 2, "text")
        handle.remove()
        assert all(parameter.is_meta for parameter in lazy.parameters()) and not readers()
    assert perplexity(lazy, tokens(2, 9), None, 2, "text").metrics["nll"] > 0


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"x" * 20)])
def test_a_file_that_goes_during_a_pass_is_one_line(saved, tokens, damage):
    folder = saved()
    _, lazy = both(folder)
    passed: list[int] = []
    lazy.model.layers[0].mlp.register_forward_hook(lambda *_: passed.append(0))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    before = {file for name, file in index.items() if ".layers.1." not in name}
    damage(folder / min({*index.values()} - before))
    with pytest.raises(InputError, match="its files have changed since it was opened: ") as error:
        perplexity(lazy, tokens(2, 9), None, 2, "text")
    assert "\n" not in str(error.value) and str(folder) in str(error.value) and passed
    assert all(parameter.is_meta for parameter in lazy.parameters()) and not readers()


def test_the_sketch_of_a_finished_layer_is_sparse_before_the_next_begins(
    saved, tokens, monkeypatch
):
    from stages import capture

    _, lazy = both(saved())
    made: list[object] = []
    build = capture.Accumulator
    monkeypatch.setattr(capture, "Accumulator", lambda *a: made.append(build(*a)) or made[-1])
    dense: list[int] = []
    lazy.model.layers[1].mlp.register_forward_hook(
        lambda *_: dense.append(sum(len(one.count) > 0 for one in made))
    )
    sketches(lazy, tokens(2, 9))
    assert dense == [10]  # those of layer 1, none of layer 0's ten
    assert len(made) == 21 and not any(len(one.count) for one in made)


def test_layers_out_of_order_or_lost_buffers_or_masks_would_be_found(saved, tokens, monkeypatch):
    """The comparisons above can fail."""
    ids = tokens(5, 14)
    whole, lazy = both(saved("mistral"))
    right = perplexity(whole, ids, None, 2, "text").metrics["nll"]
    assert perplexity(lazy, ids, None, 2, "text").metrics["nll"] == right
    found = offloaded(lazy)
    assert found is not None
    with monkeypatch.context() as patch:
        names = {0: found._keys[1]}
        patch.setattr(found, "_keys", found._keys | names)  # which files are read, not the names
        with pytest.raises((NotImplementedError, RuntimeError)):
            perplexity(lazy, ids, None, 2, "text")
    enter = forward._enter

    def unmasked(*args):
        calls = enter(*args)
        for each in calls.values():
            for _, kwargs in each:
                kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        return calls

    with monkeypatch.context() as patch:
        patch.setattr(forward, "_enter", unmasked)
        assert perplexity(lazy, ids, None, 2, "text").metrics["nll"] != right
    lazy.model.rotary_emb.inv_freq.zero_()
    assert perplexity(lazy, ids, None, 2, "text").metrics["nll"] != right


def drop(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    file = folder / names["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    index.write_text(json.dumps(names))
    weights = load_file(file)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 41}))


def cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop, "lack 1 weights, the first is model.layers.1.mlp.up_proj.weight"),
        (
            widen,
            "6 weights do not fit its config, the first is model.layers.0.mlp.down_proj.weight",
        ),
        (cut, "cannot be loaded"),
        (lambda f: sorted(f.glob("*.safetensors"))[0].unlink(), "lacks model-00001-of"),
        (
            lambda f: (f / "model.safetensors.index.json").unlink(),
            "but no model.safetensors and no model.safetensors.index.json",
        ),
    ],
    ids=["missing", "shape", "truncated", "shard", "index"],
)
def test_damaged_files_are_one_line_before_anything_is_computed(damage, says, saved):
    folder = saved()
    damage(folder)
    with pytest.raises(InputError, match=re.escape(says)) as error:
        load_offloaded(str(folder), dtype="float32", offload=Offload("memory"), **WHERE)
    assert "\n" not in str(error.value)


def test_what_needs_the_whole_model_is_refused_in_one_line(saved, tokens, byte_tokenizer):
    _, lazy = both(saved())
    ids, sites = tokens(2, 9), find_sites(lazy)
    smoothing = Smoothing(1, 1, 0.1, 0.5, 4, 16, 0.1)
    for work, says in (
        (lambda: accuracy(lazy, byte_tokenizer, None, [], 1, 1), "evaluation.tasks=[]"),
        (lambda: rotate(lazy, 0), "transform=none"),
        (
            lambda: measuring(Sensitivity("sensitivity", 1, 0))(lazy, ids, sites, 1),
            "coding.sensitivity",
        ),
        (lambda: measuring(smoothing)(lazy, ids, sites, 1), "coding=gif"),
    ):
        with pytest.raises(InputError, match=re.escape(says)) as error:
            work()
        assert str(error.value).startswith("runtime=offload: ")


def test_a_boundary_is_memory_or_a_file_that_goes(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Offload("disk").states((2, 3, 4), torch.bfloat16) as states:
        assert states.shape == (2, 3, 4) and states.dtype == torch.bfloat16
        states.fill_(3)
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size == 2 * 3 * 4 * 2
    del states
    gc.collect()
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"runtime.offload.boundary='tape': choose memory or disk"):
        Offload("tape")


def test_weights_are_found_by_the_layer_they_belong_to(saved):
    _, lazy = both(saved())
    found = offloaded(lazy)
    assert isinstance(found, Weights)
    names = {group: sorted(sum(files.values(), [])) for group, files in found._keys.items()}
    assert sorted(names) == [-1, 0, 1]
    assert names[-1] == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert all(name.startswith("model.layers.1.") for name in names[1]) and len(names[1]) == 9
