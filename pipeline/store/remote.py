"""Artifacts in an object store: whole for every reader, or not there.

Such a store has no rename. So the files of an artifact are uploaded under a name that no other upload
has, the checksum of their manifest, and the manifest comes last: what it names is whole.

    <stage>/<key>.json                   the manifest: the artifact is there with it and not before
    .files/<stage>/<key>/<checksum>/…    the files of the builder whose manifest has that checksum
    .leases/<stage>-<key>.<number>       who builds it now, see `pipeline.store.leases`
    .used/<process>                      who works with which artifacts, see `pipeline.store.uses`
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from pipeline.store import manifest
from pipeline.store.manifest import Damaged
from pipeline.store.objects import Objects

FILES = ".files"
DIGITS = 16  # of a checksum in a path
Key = tuple[str, str]  # the stage and the key of an artifact


class Remote:
    """The artifacts of an object store. Raises `objects.Away` where it does not answer."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects

    def keys(self) -> set[Key]:
        """Stage and key of every artifact."""
        stages = [name for name in self.objects.names("") if not name.startswith(".")]
        files = [(stage, name) for stage in stages for name in self.objects.names(stage)]
        return {(s, name.removesuffix(".json")) for s, name in files if name.endswith(".json")}

    def text(self, key: Key) -> bytes | None:
        """The manifest of an artifact as it was written; None where the artifact is not there."""
        return self.objects.read(_manifest(key))

    def texts(self, keys: Sequence[Key]) -> list[bytes | None]:
        """Those of several artifacts."""
        return self.objects.read_all([_manifest(key) for key in keys])

    def download(self, key: Key, text: bytes, folder: Path) -> None:
        """Put the artifact of a manifest's text into an empty folder; Damaged where it is not whole.

        FileNotFoundError where a file is absent, as when the artifact was deleted meanwhile.
        """
        record = manifest.parse(text)
        manifest.named(record, *key)
        names = [_inside(name) for name in record["files"]]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        place = _files(record)
        self.objects.get({f"{place}/{name}": folder / name for name in names})
        manifest.check(folder, record, full=True)
        for name in names:
            # Quick checks compare size and time of large files: a copy has the time of the original.
            time = record["files"][name]["mtime_ns"]
            os.utime(folder / name, ns=(time, time))
        (folder / manifest.NAME).write_bytes(text)

    def upload(self, folder: Path, over: bytes | None = None) -> bool:
        """The artifact in a folder; False where that of another builder is there, which stays.

        `over` is the text of a manifest whose artifact is damaged and may be replaced.
        """
        text = (folder / manifest.NAME).read_bytes()
        record = manifest.parse(text)
        key = (record["stage"], record["key"])
        present = self.text(key)
        if present not in (None, over):
            return present == text
        place = _files(record)
        self.objects.put({f"{place}/{name}": folder / name for name in record["files"]})
        if self._publish(key, text, replace=present is not None) or self.text(key) == text:
            return True
        self.objects.delete_folder(place)
        return False

    def remove(self, key: Key) -> None:
        """Delete an artifact, its manifest first, and what unfinished uploads of it have left."""
        self.objects.delete(_manifest(key))
        self.objects.delete_folder("/".join((FILES, *key)))

    def leftovers(self) -> dict[tuple[Key, str], float]:
        """Files that no manifest names, by artifact and checksum: seconds since the last was written."""
        ages: dict[tuple[Key, str], float] = {}
        for path, age in self.objects.ages(FILES).items():
            stage, key, checksum, *name = path.split("/")
            if name:
                place = ((stage, key), checksum)
                ages[place] = min(age, ages.get(place, age))
        keys = sorted({key for key, _ in ages})
        named = {(key, _checksum(t)) for key, t in zip(keys, self.texts(keys), strict=True) if t}
        return {place: age for place, age in ages.items() if place not in named}

    def remove_leftover(self, key: Key, checksum: str) -> None:
        self.objects.delete_folder("/".join((FILES, *key, checksum)))

    def _publish(self, key: Key, text: bytes, replace: bool) -> bool:
        """Whether a manifest was written, whole; False where there is another already."""
        path = _manifest(key)
        if not self.objects.atomic:
            part = f"{path}.{uuid4().hex}.part"
            self.objects.write(part, text)
            self.objects.rename(part, path)  # of two at the same moment, the last stays
        elif replace or not self.objects.creates:
            self.objects.write(path, text)  # likewise
        else:
            return self.objects.create(path, text)
        return True


def _manifest(key: Key) -> str:
    return f"{key[0]}/{key[1]}.json"


def _files(record: Mapping[str, Any]) -> str:
    checksum = manifest.checksum_of(record)[:DIGITS]
    return "/".join((FILES, record["stage"], record["key"], checksum))


def _checksum(text: bytes) -> str:
    try:
        return manifest.checksum_of(manifest.parse(text))[:DIGITS]
    except Damaged:
        return ""


def _inside(name: str) -> str:
    """The name of a file, which must lie in the folder of its artifact."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise Damaged(f"{name} is no file of an artifact")
    return name
