"""Which artifacts are worked with, so that none of them, nor a unit of them, is cleaned away meanwhile.

A file of their keys says so, `.used/<process>`, which its process writes again every hour and deletes in
the end. That of a process which was killed stays: it counts no more once the process is gone, or on
another machine once it was not written for a day.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from pipeline.store import processes, whole
from pipeline.store.locks import Heartbeat

FOLDER = ".used"
BEAT = 3600.0  # seconds between two signs of life
PATIENCE = 86400.0  # seconds after which what another machine has not touched is a leftover


class Files(Protocol):
    """Where such files are: `pipeline.store.objects.Objects`, or `Folder`."""

    def write(self, path: str, data: bytes) -> None: ...

    def delete(self, path: str) -> None: ...

    def ages(self, folder: str) -> Mapping[str, float]: ...

    def read(self, path: str) -> bytes | None: ...


class Folder:
    """Files in a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, path: str, data: bytes) -> None:
        whole.write(self._root / path, data.decode())

    def delete(self, path: str) -> None:
        (self._root / path).unlink(missing_ok=True)

    def ages(self, folder: str) -> dict[str, float]:
        """Seconds since each file was written."""
        ages = {}
        for place in (self._root / folder).glob("*"):
            with suppress(FileNotFoundError):  # deleted meanwhile
                ages[place.name] = time.time() - place.stat().st_mtime
        return ages

    def read(self, path: str) -> bytes | None:
        try:
            return (self._root / path).read_bytes()
        except FileNotFoundError:
            return None


@contextmanager
def using(files: Files, keys: Iterable[str]) -> Iterator[None]:
    """Say that this process works with artifacts of these keys while the context is open."""
    path, text = f"{FOLDER}/{processes.file_name()}", "\n".join(sorted({*keys})).encode()

    def beat() -> bool:
        files.write(path, text)
        return True

    beat()
    heart = Heartbeat(path, beat, BEAT)
    try:
        yield
    finally:
        heart.stop()
        with suppress(Exception):  # what stays counts no more without its process
            files.delete(path)


def used(files: Files) -> set[str]:
    """The keys of all artifacts that processes work with; files that have no process left are deleted."""
    keys: set[str] = set()
    for name, age in files.ages(FOLDER).items():
        path = f"{FOLDER}/{name}"
        if at_work(name, age):
            keys |= {*(files.read(path) or b"").decode().split()}
        else:
            files.delete(path)
    return keys


def at_work(name: str, age: float) -> bool:
    """Whether the process that has given a `processes.file_name` may still be at what has changed `age`
    seconds ago; of another machine none is known to be gone, and a day is enough."""
    process = processes.of_file(name)
    if process is None:
        return False
    if processes.is_here(process):
        return not processes.is_gone(process, time.time() - age)
    return age < PATIENCE
