"""Who builds an artifact while others wait for it: locks of files, leases of objects, a Redis server.

A lock saves work and nothing else. Artifacts are whole with a lock and without, so that one that is
lost, expires or does not hold between two machines costs a second build of the same artifact at most.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from filelock import FileLock, Timeout

from stages.errors import InputError

log = logging.getLogger(__name__)
SECONDS = 60.0  # until others go on without the holder of a lease who gives no sign of life
POLL = 2.0  # seconds between two looks at a lease of another


class Lock(Protocol):
    """The right to build one artifact."""

    def acquire(self, wait: bool) -> bool:
        """Take it, whatever time that takes where `wait` is given; False if another has it."""

    def release(self) -> None: ...


@dataclass(frozen=True)
class Locks:
    """The lock of each artifact by a name. `exclusive` says that it holds against all other builders, so
    that what they have left unfinished is a leftover."""

    of: Callable[[str], Lock]
    exclusive: bool = True
    forget: Callable[[str], None] = lambda name: (
        None
    )  # what is left of one that nobody asks for again


def in_folder(folder: Path, exclusive: bool = True) -> Locks:
    """Locks by flock(2), which the system takes back when their holder dies."""

    def place(name: str) -> Path:
        return folder / f"{name}.lock"

    return Locks(
        lambda name: _InFolder(place(name)),
        exclusive,
        lambda name: place(name).unlink(missing_ok=True),
    )


def none() -> Locks:
    """No locks: several may build one artifact at the same time, and the first to finish gives it."""
    return Locks(lambda name: Chained(()), exclusive=False)


class _InFolder:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path)

    def acquire(self, wait: bool) -> bool:
        try:
            self._lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        self._lock.release()


@dataclass(frozen=True)
class Chained:
    """Several locks as one, taken in their order: of this machine's processes, then of the machines."""

    locks: Sequence[Lock]

    def acquire(self, wait: bool) -> bool:
        taken: list[Lock] = []
        try:
            for lock in self.locks:
                if not lock.acquire(wait):
                    break
                taken.append(lock)
            else:
                return True
        except BaseException:
            _release(taken)
            raise
        _release(taken)
        return False

    def release(self) -> None:
        _release(self.locks)


def _release(locks: Sequence[Lock]) -> None:
    for lock in reversed(locks):
        lock.release()


class IfThere:
    """A lock of a service: where that does not answer, its holder goes on without, and a line says so."""

    def __init__(self, make: Callable[[], Lock]) -> None:
        self._make, self._lock = make, cast(Lock, Chained(()))

    def acquire(self, wait: bool) -> bool:
        try:
            self._lock = self._make()
            return self._lock.acquire(wait)
        except Exception as error:  # every client has errors of its own
            text = " ".join(str(error).split())
            log.warning("no lock (%s): another machine may build the same artifact", text)
            self._lock = Chained(())
            return True

    def release(self) -> None:
        self._lock.release()


class Heartbeat:
    """Calls `beat` in a thread until it is stopped or says that the lock is lost.

    An error of a beat is not the end: the next one may succeed before the lock expires.
    """

    def __init__(self, name: str, beat: Callable[[], bool], every: float) -> None:
        self._name, self._beat, self._every = name, beat, every
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lock {name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)  # one that hangs on the network is left alone

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            try:
                kept = self._beat()
            except Exception as error:
                log.debug("the lock of %s could not be renewed: %s", self._name, error)
                continue
            if not kept:
                log.warning("%s is built by another machine too: its lock had expired", self._name)
                return


class RedisLock:
    """A lock of a Redis server, which forgets it where its holder gives no sign of life."""

    def __init__(self, client: Any, name: str) -> None:
        self._name = name
        self._lock = client.lock(name, timeout=SECONDS, sleep=POLL / 4, thread_local=False)
        self._heart: Heartbeat | None = None

    def acquire(self, wait: bool) -> bool:
        if not self._lock.acquire(blocking=wait):
            return False
        self._heart = Heartbeat(self._name, self._beat, SECONDS / 3)
        return True

    def _beat(self) -> bool:
        if not self._lock.owned():
            return False
        return bool(self._lock.reacquire())

    def release(self) -> None:
        if self._heart is not None:
            self._heart.stop()
        with suppress(Exception):  # what stays expires
            self._lock.release()


def redis_client(url: str) -> Any:
    """The client of a Redis server. Raises InputError where that does not answer.

    Its password is in REDISCLI_AUTH, as for redis-cli.
    """
    try:
        from redis import Redis  # an extra
        from redis.exceptions import RedisError
    except ImportError:
        raise InputError(
            f"store.lock={url}: a library is missing: python -m pip install -c constraints.txt -e .[redis]"
        ) from None
    client = Redis.from_url(url, password=os.environ.get("REDISCLI_AUTH"), socket_timeout=10)
    try:
        client.ping()
    except (RedisError, OSError) as error:
        raise InputError(f"store.lock={url}: {error}; start the server, or give another") from None
    return client
