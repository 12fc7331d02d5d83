"""What identifies the files of a local model, so that changed weights or words are another model."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from pipeline.store.manifest import sha256_of
from stages.errors import InputError

HASHED_IN_FULL = 4 << 30  # bytes of all weights; of larger ones only samples are read
SAMPLES, SAMPLE = 256, 4096  # of a large file: how many, and their bytes
# Files that no model or tokenizer is read from: cards, pictures, logs, weights in other formats.
UNREAD = {
    ".md",
    ".py",
    ".png",
    ".jpg",
    ".svg",
    ".pdf",
    ".log",
    ".lock",
    ".gguf",
    ".onnx",
    ".msgpack",
}
UNREAD |= {".bin", ".pt", ".pth", ".h5", ".ot", ".tflite", ".zip"}


def folder_fingerprint(folder: Path) -> dict[str, str]:
    """A digest of every file by its name: what stands in the folder, and the shards its index names.

    Where the weights have more than 4 GiB, a file of theirs counts by size, time and samples.
    """
    files = {p.name: p for p in sorted(folder.iterdir()) if _counts(p)}
    for index in [p for name, p in files.items() if name.endswith(".safetensors.index.json")]:
        files |= {name: folder / name for name in _shards(index) if (folder / name).is_file()}
    weights = {name: p.stat() for name, p in files.items() if p.suffix == ".safetensors"}
    large = sum(stat.st_size for stat in weights.values()) > HASHED_IN_FULL
    return {
        name: _sampled(path) if large and name in weights else digest(path)
        for name, path in sorted(files.items())
    }


def digest(path: Path) -> str:
    """The sha256 of a file, read once for all jobs."""
    stat = path.stat()
    return sha256_of(path.resolve(), stat.st_size, stat.st_mtime_ns)


def _counts(path: Path) -> bool:
    return path.is_file() and path.suffix not in UNREAD and not path.name.startswith(".")


def _shards(index: Path) -> list[str]:
    """The files of an index of shards, which may lie in folders below."""
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of shards: {error}") from error


def _sampled(path: Path) -> str:
    size, time = path.stat().st_size, path.stat().st_mtime_ns
    return f"{size} bytes, {time}, {_samples(path.resolve(), size, time)}"


@functools.cache
def _samples(path: Path, size: int, mtime_ns: int) -> str:
    """sha256 of samples at even distances: archives give many files one time, weights one size."""
    hashed = hashlib.sha256()
    with path.open("rb") as stream:
        for number in range(SAMPLES):
            stream.seek(number * max(size - SAMPLE, 0) // (SAMPLES - 1))
            hashed.update(stream.read(SAMPLE))
    return hashed.hexdigest()
