"""Which store a configuration means, and the one function that opens it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from pipeline.store import locks, objects
from pipeline.store.leases import Lease, Seen
from pipeline.store.locks import Lock, Locks
from pipeline.store.mounts import private_locks
from pipeline.store.objects import Objects
from pipeline.store.remote import Remote
from pipeline.store.shared import SharedStore
from pipeline.store.store import LOCKS, Store
from stages.errors import InputError

log = logging.getLogger(__name__)
REDIS = ("redis", "rediss", "unix")


@dataclass(frozen=True)
class StoreSpec:
    """Where artifacts are: a folder, or an address that fsspec knows with the folder `cache` in front.

    `lock` is auto, file, lease, none or the address of a Redis server; `unshared` are the stages whose
    artifacts stay in the cache.
    """

    path: str
    cache: str = "outputs/cache"
    lock: str = "auto"
    unshared: Sequence[str] = ("asset", "model")

    def __post_init__(self) -> None:
        scheme = urlsplit(self.lock).scheme
        if self.lock not in ("auto", "file", "lease", "none") and scheme not in REDIS:
            raise InputError(
                f"store.lock={self.lock}: choose auto, file, lease, none or redis://HOST:PORT/NUMBER"
            )
        for option in ("path", "lock"):
            if urlsplit(
                getattr(self, option)
            ).password:  # files, logs and the dashboard would keep it
                raise InputError(
                    f"store.{option} has a password in it: leave it to the configuration of fsspec, or to "
                    "REDISCLI_AUTH for Redis"
                )
        if self.remote and self.lock == "file":
            raise InputError(f"store.lock=file with store.path={self.path}: give auto, or a folder")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """The store of a composed configuration, also of an earlier version's."""
        known = {field.name for field in fields(cls)}
        return cls(**{str(name): value for name, value in config.items() if name in known})

    @property
    def remote(self) -> bool:
        """Whether artifacts are behind an address."""
        return "://" in self.path

    @property
    def folder(self) -> Path:
        """The folder on this machine: of the artifacts, or of their cache."""
        return Path(self.cache if self.remote else self.path)

    @property
    def kernels(self) -> Path:
        """Where this machine keeps what it compiles."""
        return self.folder / ".compiled"

    def open(self, runtime: Mapping[str, Any] | None = None) -> Store:
        """The store. `runtime` is written into the manifests of what it builds.

        Raises InputError for an unknown protocol, a library or a lock service that is not there. The
        address itself is asked by `Store.check`, or when it is first used.
        """
        if not self.remote:
            return Store(self.folder, runtime, self._in_folder(self.folder))
        objects.known(self.path)
        remote = Remote(_objects(self.path))
        between = self._between(remote.objects)
        return SharedStore(self.folder, remote, runtime, between, self.unshared)

    def _in_folder(self, folder: Path) -> Locks:
        if self.lock == "none":
            return locks.none()
        if self.lock == "lease":
            there = _objects(f"file://{folder.absolute()}")
            return _by_leases(there)
        if urlsplit(self.lock).scheme in REDIS:
            return _by_redis(self.lock, str(folder.absolute()))
        return locks.in_folder(folder / LOCKS, exclusive=_holds(folder))

    def _between(self, there: Objects) -> Locks:
        if self.lock == "none":
            return locks.none()
        if urlsplit(self.lock).scheme in REDIS:
            return _by_redis(self.lock, there.address)
        if self.lock == "lease" and not there.creates:
            raise InputError(f"store.lock=lease: {NO_LEASES.format(there.address)}")
        return _by_leases(there)


NO_LEASES = (
    "{} has no conditional writes, so that two machines may build one artifact at the same time; give "
    "store.lock=redis://HOST"
)


@functools.cache
def _objects(address: str) -> Objects:
    """One for each address: what it was found to do is asked once."""
    return Objects(address)


def _by_leases(there: Objects) -> Locks:
    seen: dict[str, Seen] = {}

    def lock(name: str) -> Lock:
        if there.creates:
            return Lease(there, name, seen=seen)
        _warn(NO_LEASES.format(there.address))
        return locks.Chained(())

    return Locks(lock)


def _by_redis(url: str, store: str) -> Locks:
    client = locks.redis_client(url)
    return Locks(lambda name: locks.RedisLock(client, f"{store}/{name}"))


def _holds(folder: Path) -> bool:
    """Whether locks of files hold against other machines, as far as the mount says."""
    if why := private_locks(folder):
        _warn(
            f"{folder} is mounted as {why}: locks hold on this machine only, and others may build "
            "the same artifact; give store.lock=lease on all of them, or mount it otherwise"
        )
    return not why


@functools.cache
def _warn(line: str) -> None:
    """Once in a process."""
    log.warning(line)
