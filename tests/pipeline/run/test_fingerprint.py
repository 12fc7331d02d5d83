"""Every file that a model or tokenizer is read from is in the fingerprint of its folder, nothing else."""

import json
import os
from pathlib import Path

import pytest

from pipeline.run import fingerprint
from pipeline.run.fingerprint import folder_fingerprint
from stages.errors import InputError

READ = [
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "tokenizer.model.v3", "spiece.spm"),
    *("qwen.tiktoken", "vocab.bpe", "chat_template.jinja", "special_tokens_map.json"),
]
UNREAD = ["README.md", "pytorch_model.bin", "training.log", "picture.png", ".gitattributes"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*READ, *UNREAD):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize("name", READ)
def test_what_is_read_counts(folder: Path, name: str) -> None:
    before = folder_fingerprint(folder)
    (folder / name).write_text(name.upper())
    changed = folder_fingerprint(folder)
    assert [n for n in before if before[n] != changed[n]] == [name]
    (folder / name).unlink()
    assert set(folder_fingerprint(folder)) == set(READ) - {name}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_does_not(folder: Path, name: str) -> None:
    before = folder_fingerprint(folder)
    (folder / name).unlink()
    (folder / "runs").mkdir()
    (folder / "runs" / "events.json").write_text("of a training")
    assert folder_fingerprint(folder) == before


def test_shards_count_where_their_index_says_they_lie(folder: Path) -> None:
    shard = folder / "shards" / "1.safetensors"
    shard.parent.mkdir()
    shard.write_text("weights")
    plain = folder_fingerprint(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "shards/1.safetensors"}}))
    before = folder_fingerprint(folder)
    assert set(before) - set(plain) == {index.name, "shards/1.safetensors"}
    shard.write_text("others!")
    assert folder_fingerprint(folder) != before
    index.write_text("{}")
    with pytest.raises(InputError, match=r"model.safetensors.index.json is no index of shards"):
        folder_fingerprint(folder)


def test_a_link_counts_by_what_it_points_to(folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("a", "b"):
        (blobs / name).write_text(f"weights {name}")
        os.utime(blobs / name, ns=(1, 1))
    link = folder / "model.safetensors"
    found = []
    for name in ("a", "b", "gone"):
        link.unlink()
        link.symlink_to(blobs / name)
        found.append(folder_fingerprint(folder))
    assert found[0]["model.safetensors"] != found[1]["model.safetensors"]
    assert "model.safetensors" not in found[2]  # which is told when the model is loaded


@pytest.mark.parametrize("place", [0, 3_000_000, 5_999_999])
def test_large_weights_of_one_size_and_time_differ_by_what_they_hold(
    folder: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "HASHED_IN_FULL", 1_000_000)
    first, second = folder / "model.safetensors", folder / "b" / "model.safetensors"
    weights = bytearray(os.urandom(6_000_000))
    first.write_bytes(weights)
    second.parent.mkdir()
    stop = place + 30_000  # a layer: more than a gap between two samples
    weights[place:stop] = bytes(b ^ 1 for b in weights[place:stop])
    second.write_bytes(weights)
    for file in (first, second):
        os.utime(file, ns=(1, 1))  # as archives have it that are made reproducibly
    one, other = folder_fingerprint(folder), folder_fingerprint(second.parent)
    assert one["model.safetensors"] != other["model.safetensors"]
    assert one["model.safetensors"].startswith("6000000 bytes, 1, ")
    assert "bytes" not in one["tokenizer.json"]
