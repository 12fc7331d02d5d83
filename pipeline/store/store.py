"""The artifact store: each result is built once, verified when loaded, rebuilt when damaged.

A folder `<root>/<stage>/<key>/` holds the files and a manifest.json with what determined them and
the sha256 of each. `python -m pipeline store ls|show|verify|gc` looks after it.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.store import manifest, provenance
from pipeline.store.manifest import Damaged
from pipeline.store.step import Step, plain
from stages.errors import InputError

log = logging.getLogger(__name__)
SHARES = "shares"  # the folder of what processes have made of artifacts that they share


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
    """Artifacts under one folder, shared by any number of processes.

    `runtime` is what may not change the meaning of a result (device, batch size); it is written
    into the manifests of what this store builds and is no part of any key.
    """

    def __init__(self, root: Path, runtime: Mapping[str, Any] | None = None):
        self.root = Path(root)
        self.runtime = plain(runtime or {}, "runtime")

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
        try:
            lock.acquire()
        except Timeout:
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
            _discard(self.root / stage / key)
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
            raise InputError(f"no artifact {stage}/{key} in {self.root}; run what makes it first")
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

    def folders(self) -> list[Path]:
        """The folders of all artifacts, whole or damaged."""
        places = self.root.glob("[!.]*/[!.]*")
        return sorted(path for path in places if path.is_dir())

    def orphans(self) -> list[Path]:
        """Temporary folders whose builder was killed."""
        return [path for path in self._temporary("*", "*") if not self._busy(path)]

    def remove(self, path: Path) -> bool:
        """Delete an artifact or an orphan; False if some process is working on it."""
        with suppress(Timeout), self._lock(path.parent.name, _key(path)):
            if path.exists():
                _discard(path)
            return True
        return False

    def forget(self, step: Step) -> None:
        """Delete the lock of an artifact that nobody asks for again."""
        Path(self._lock(step.stage, step.key()).lock_file).unlink(missing_ok=True)

    def _make(
        self, step: Step, key: str, make: Callable[[Path], None], spent: float = 0.0
    ) -> Artifact:
        folder = self.root / step.stage
        temporary = folder / f".tmp-{key}-{os.getpid()}"
        temporary.mkdir(parents=True)
        try:
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
            os.rename(temporary, folder / key)
        except BaseException:
            shutil.rmtree(temporary)
            raise
        return Artifact(step.stage, key, folder / key, record, hit=False)

    def _lock(self, stage: str, key: str) -> FileLock:
        """The lock of one artifact, which the system takes back when its holder dies."""
        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{stage}-{key}.lock", timeout=0)

    @contextmanager
    def _locked(self, stage: str, key: str) -> Iterator[None]:
        lock = self._lock(stage, key)
        try:
            lock.acquire()
        except Timeout:
            log.info("another process is building %s %s; waiting for it", stage, key)
            lock.acquire(timeout=-1)
        try:
            yield
        finally:
            lock.release()

    def _busy(self, path: Path) -> bool:
        try:
            with self._lock(path.parent.name, _key(path)):
                return False
        except Timeout:
            return True

    def _temporary(self, stage: str, key: str) -> list[Path]:
        return sorted(self.root.glob(f"{stage}/.tmp-{key}-*"))


def _key(path: Path) -> str:
    """The key that the folder of an artifact or a temporary folder belongs to."""
    return path.name.removeprefix(".tmp-").partition("-")[0]


def _discard(path: Path) -> None:
    """Delete a folder such that no other process sees half of it."""
    aside = path.with_name(f".tmp-{_key(path)}-discarded-{os.getpid()}")
    os.rename(path, aside)
    shutil.rmtree(aside)


if __name__ == "__main__":
    raise SystemExit("nothing was done: the command is `python -m pipeline store`")
