"""The artifact store: each result is built once, verified when loaded, rebuilt when damaged.

A folder `<root>/<stage>/<key>/` holds the files and a manifest.json with what determined them and
the sha256 of each. `python -m pipeline store ls|show|verify|gc` looks after it.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.store import locks, manifest, processes, provenance, uses
from pipeline.store.locks import Lock, Locks
from pipeline.store.manifest import Damaged
from pipeline.store.step import Step, plain
from stages.errors import InputError

log = logging.getLogger(__name__)
LOCKS = ".locks"
SHARES = "shares"  # the folder of what processes have made of artifacts that they share
ASIDE = "-discarded"


@dataclass(frozen=True)
class Artifact:
    """A complete folder of files; `hit` says that it was there before it was asked for."""

    stage: str
    key: str
    path: Path
    manifest: dict[str, Any]
    hit: bool

    @property
    def seconds(self) -> float:
        """Wall time of the build, as measured then."""
        return float(self.manifest["seconds"])


class Store:
    """Artifacts under one folder, shared by any number of processes and machines.

    `runtime` is what may not change the meaning of a result (device, batch size); it is written
    into the manifests of what this store builds and is no part of any key. `locked` says which locks
    builders take, files of the folder unless given.
    """

    def __init__(
        self,
        root: Path,
        runtime: Mapping[str, Any] | None = None,
        locked: Locks | None = None,
    ):
        self.root = Path(root)
        self.runtime = plain(runtime or {}, "runtime")
        self.locks = locked or locks.in_folder(self.root / LOCKS)

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.root)

    def reach(self) -> None:
        """Raises InputError where there is no such store, or it does not answer."""
        if not self.root.is_dir():
            raise InputError(f"no store at {self.root}; give its folder or address with --store")

    def check(self) -> None:
        """Raises InputError where a store that is not in a folder cannot be written to."""

    def find(self, step: Step) -> Artifact | None:
        """The artifact of a step, or None if it is not there or is damaged, which is logged."""
        try:
            return self.load(step.stage, step.key())
        except Damaged as fault:
            log.warning("%s", fault)
            return None

    def build(self, step: Step, make: Callable[[Path], None]) -> Artifact:
        """The artifact of a step; if need be, `make` writes its files into the folder it is given.

        One process builds while others wait and then load. If `make` raises, nothing is left.
        """
        key = step.key()
        with suppress(Damaged):  # looked at again under the lock
            if artifact := self.load(step.stage, key):
                return artifact
        with self._locked(step.stage, key):
            return self._cleared(step.stage, key) or self._make(step, key, make)

    @contextmanager
    def claim(self, step: Step) -> Iterator[Callable[..., Artifact] | None]:
        """Give the right to build an artifact while the context is open, None if it is there or another
        process builds it: a function of `make`, as in `build`, and of seconds that were spent before."""
        key = step.key()
        lock = self._lock(step.stage, key)
        if not lock.acquire(wait=False):
            yield None
            return
        try:
            there = self._cleared(step.stage, key)
            yield None if there else partial(self._make, step, key)
        finally:
            lock.release()

    def _cleared(self, stage: str, key: str) -> Artifact | None:
        """The artifact, under its lock; what is damaged or was left half-built goes."""
        try:
            if artifact := self.load(stage, key):
                return artifact
        except Damaged as fault:
            log.warning("%s; building it again", fault)
            discard(self.root / stage / key)
        if self.locks.exclusive:
            for leftover in self._temporary(stage, key):  # of killed builders
                shutil.rmtree(leftover)
        return None

    def open(self, stage: str, key: str) -> Artifact:
        """An artifact that must be there, else an InputError."""
        try:
            artifact = self.load(stage, key)
        except Damaged as fault:
            raise InputError(f"{fault}; run the command that made it again") from None
        if artifact is None:
            raise InputError(f"no artifact {stage}/{key} in {self.name}; run what makes it first")
        return artifact

    def load(self, stage: str, key: str, full: bool = False) -> Artifact | None:
        """The artifact if it is there, verified (see `manifest.verified`); else None or Damaged."""
        path = self.root / stage / key
        if not path.exists():
            return None
        try:
            return Artifact(stage, key, path, manifest.verified(path, full), hit=True)
        except Damaged as fault:
            raise Damaged(f"artifact {path} is damaged: {fault}") from None

    def holds(self, stage: str, key: str) -> bool:
        """Whether an artifact is there, whole or damaged; nothing of it is read."""
        return (self.root / stage / key).is_dir()

    def folder(self, stage: str, key: str) -> Path:
        """The folder of an artifact, which is not verified; there is none where the store lacks it."""
        return self.root / stage / key

    def folders(self) -> list[Path]:
        """The folders of all artifacts, whole or damaged."""
        places = self.root.glob("[!.]*/[!.]*")
        return sorted(path for path in places if path.is_dir())

    def records(self, paths: Sequence[Path]) -> dict[Path, dict[str, Any] | None]:
        """The manifests of some of the `folders`; None for a damaged one."""
        return {path: _record(path) for path in paths}

    def verify(self, path: Path) -> None:
        """Read all files of one of the `folders`; raises Damaged."""
        manifest.verified(path, full=True)

    def using(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Say that this process works with artifacts of these keys while the context is open."""
        return uses.using(uses.Folder(self.root), keys)

    def used(self) -> set[str]:
        """Keys of the artifacts that processes work with."""
        return uses.used(uses.Folder(self.root))

    def orphans(self) -> list[Path]:
        """Temporary folders whose builder was killed."""
        return [path for path in self._temporary("*", "*") if not self._busy(path)]

    def remove(self, path: Path) -> bool:
        """Delete an artifact or an orphan; False if some process is working on it."""
        lock = self._lock(path.parent.name, _key(path))
        if not lock.acquire(wait=False):
            return False
        try:
            self._delete(path)
        finally:
            lock.release()
        return True

    def _delete(self, path: Path) -> None:
        if path.exists():
            discard(path)

    def forget(self, step: Step) -> None:
        """Delete the lock of an artifact that nobody asks for again."""
        self.locks.forget(f"{step.stage}-{step.key()}")

    def _make(
        self, step: Step, key: str, make: Callable[[Path], None], spent: float = 0.0
    ) -> Artifact:
        folder = self.root / step.stage
        temporary = folder / f".tmp-{key}-{processes.file_name()}"
        temporary.mkdir(parents=True)
        try:
            # On a network file system a machine remembers for a minute that an artifact is not there,
            # unless it changes the folder itself, as it has now.
            if (folder / key).exists() and (artifact := self.load(step.stage, key)):
                shutil.rmtree(temporary)
                return artifact
            start = time.perf_counter()
            make(temporary)
            record = {
                "stage": step.stage,
                "key": key,
                "spec": plain(step.spec),
                "inputs": dict(step.inputs),
                "code": step.code(),
                "seconds": round(spent + time.perf_counter() - start, 3),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": manifest.entries(temporary),
                "runtime": self.runtime,
                "versions": provenance.versions(),
                "git": provenance.git_state(),
                "machine": provenance.machine(),
            }
            manifest.write(temporary, record)
            if not placed(temporary, folder / key):  # no lock has held
                shutil.rmtree(temporary)
                return self.open(step.stage, key)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return Artifact(step.stage, key, folder / key, record, hit=False)

    def _lock(self, stage: str, key: str) -> Lock:
        """The lock of one artifact."""
        return self.locks.of(f"{stage}-{key}")

    @contextmanager
    def _locked(self, stage: str, key: str) -> Iterator[None]:
        lock = self._lock(stage, key)
        if not lock.acquire(wait=False):
            log.info("another process is building %s %s; waiting for it", stage, key)
            lock.acquire(wait=True)
        try:
            yield
        finally:
            lock.release()

    def _busy(self, path: Path) -> bool:
        """Whether somebody may still be building in a temporary folder.

        A free lock is not enough: the builder may take other locks than this process was told of.
        """
        lock = self._lock(path.parent.name, _key(path))
        if not lock.acquire(wait=False):
            return True
        lock.release()
        name = path.name.removeprefix(f".tmp-{_key(path)}-").removesuffix(ASIDE)
        with suppress(FileNotFoundError):
            return uses.at_work(name, time.time() - path.stat().st_mtime)
        return False

    def _temporary(self, stage: str, key: str) -> list[Path]:
        return sorted(self.root.glob(f"{stage}/.tmp-{key}-*"))


def _key(path: Path) -> str:
    """The key that the folder of an artifact or a temporary folder belongs to."""
    return path.name.removeprefix(".tmp-").partition("-")[0]


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        return manifest.read(folder)
    except Damaged:
        return None


def placed(temporary: Path, folder: Path) -> bool:
    """Give a whole folder its name; False where another has it already."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if folder.is_dir():  # each network file system has an error of its own for that
            return False
        raise
    return True


def discard(path: Path) -> None:
    """Delete a folder such that no other process sees half of it."""
    aside = path.with_name(f".tmp-{_key(path)}-{processes.file_name()}{ASIDE}")
    with suppress(FileNotFoundError):  # another has
        os.rename(path, aside)
        shutil.rmtree(aside)


if __name__ == "__main__":
    raise SystemExit("nothing was done: the command is `python -m pipeline store`")
