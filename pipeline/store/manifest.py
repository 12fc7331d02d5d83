"""The manifest of an artifact: what its folder must hold, and whether it does."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.store.step import canonical

NAME = "manifest.json"
LARGE = 100_000_000  # bytes; above this a quick check trusts size and time


class Damaged(Exception):
    """The files of an artifact are not what its manifest says."""


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256, bytes and mtime_ns of each file below a folder, by relative name."""
    return {name: _entry(folder / name) for name in _names(folder)}


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Put the manifest into its folder, sealed with a checksum of its own."""
    sealed = {**manifest, "checksum": checksum_of(manifest)}
    (folder / NAME).write_text(json.dumps(sealed, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The manifest in a folder; Damaged if it is missing or not what was written."""
    try:
        text = (folder / NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{NAME} is missing") from None
    return parse(text)


def parse(text: bytes) -> dict[str, Any]:
    """The manifest that a text holds; Damaged if it is not what was written."""
    try:
        manifest: dict[str, Any] = json.loads(text)
        checksum = manifest.pop("checksum")
    except (ValueError, LookupError, AttributeError, TypeError):
        raise Damaged(f"{NAME} is unreadable") from None
    if checksum != checksum_of(manifest):
        raise Damaged(f"{NAME} has been altered")
    return manifest


def verified(folder: Path, full: bool = False) -> dict[str, Any]:
    """The manifest of a folder whose files all match it, else Damaged.

    `full` reads every file, also the large ones and those that this process has read before.
    """
    manifest = read(folder)
    named(manifest, folder.parent.name, folder.name)
    check(folder, manifest, full)
    return manifest


def named(manifest: Mapping[str, Any], stage: str, key: str) -> None:
    """Raises Damaged for the manifest of another artifact."""
    if (manifest["stage"], manifest["key"]) != (stage, key):
        raise Damaged(f"{NAME} belongs to {manifest['stage']}/{manifest['key']}")


def check(folder: Path, manifest: Mapping[str, Any], full: bool = False) -> None:
    """Raises Damaged unless a folder holds the files of a manifest and no others; see `verified`."""
    if odd := {*manifest["files"]} ^ {*_names(folder)}:
        raise Damaged(f"{min(odd)} is missing or does not belong there")
    for name, entry in manifest["files"].items():
        try:
            _check(folder / name, entry, full)
        except (Damaged, FileNotFoundError) as fault:
            raise Damaged(f"{name} {fault}") from None


def _check(file: Path, entry: Mapping[str, Any], full: bool) -> None:
    stat = file.stat()
    if stat.st_size != entry["bytes"]:
        raise Damaged(f"has {stat.st_size} bytes instead of {entry['bytes']}")
    if stat.st_size > LARGE and stat.st_mtime_ns == entry["mtime_ns"] and not full:
        return  # a large file with another time may be a mere copy: its digest decides
    digest = sha256_of.__wrapped__ if full else sha256_of
    if digest(file, stat.st_size, stat.st_mtime_ns) != entry["sha256"]:
        raise Damaged("has been altered")


def _names(folder: Path) -> list[str]:
    files = (f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    return sorted(name for name in files if name != NAME)


def _entry(file: Path) -> dict[str, Any]:
    stat = file.stat()
    digest = sha256_of(file, stat.st_size, stat.st_mtime_ns)
    return {"sha256": digest, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


@functools.cache
def sha256_of(file: Path, size: int, mtime_ns: int) -> str:
    """Digest of a file, read once per process as long as its size and time stay the same."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksum_of(manifest: Mapping[str, Any]) -> str:
    """sha256 of what a manifest says, the digests of all files among it."""
    return hashlib.sha256(canonical(manifest).encode()).hexdigest()
