"""A lock of files that are created only where they are not there.

S3 has `If-None-Match: *` for that, and a folder O_EXCL, which holds on every network file system.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from uuid import uuid4

from pipeline.store.locks import POLL, SECONDS, Heartbeat
from pipeline.store.objects import Objects

FOLDER = ".leases"
Seen = tuple[int, bytes | None, float]  # a number, its content, and when that was first seen
LONG = 10  # times the seconds of a lease, after which no clock can be that wrong


class Lease:
    """A lock of numbered files, `.leases/<name>.<number>`: the highest has the lock while it changes.

    A number is created only where it is not there, so that of all who find number n given back or dead
    one gets n + 1. Its holder writes it every third of `seconds`; others take n + 1 once it has not
    changed for so long by their own clock, and none needs the right time.
    """

    def __init__(
        self,
        objects: Objects,
        name: str,
        seconds: float = SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        seen: dict[str, Seen] | None = None,
    ) -> None:
        """`seen` is what this process last saw of leases by their names: who comes by again and again
        without waiting notices by it that a holder is dead."""
        self._objects, self._name, self._seconds = objects, name, seconds
        self._clock, self._sleep = clock, sleep
        self._seen = {} if seen is None else seen
        self._number = -1
        self._token = uuid4().hex
        self._beats = 0
        self._heart: Heartbeat | None = None

    def acquire(self, wait: bool) -> bool:
        while True:
            numbers = self._numbers()
            if numbers:
                now = numbers[-1], self._objects.read(self._path(numbers[-1]))
                dead = self._unchanged(*now) > self._seconds
                if (dead or (not wait and self._long_dead(now[0]))) and self._take(now[0]):
                    return True
            if (not numbers or now[1] is None) and self._take(None):
                return True
            if not wait:
                return False
            self._sleep(POLL)

    def _unchanged(self, number: int, content: bytes | None) -> float:
        """Seconds since this process first saw the highest number with this content."""
        last = self._seen.get(self._name)
        if last is None or last[:2] != (number, content):
            last = self._seen[self._name] = (number, content, self._clock())
        return self._clock() - last[2]

    def release(self) -> None:
        if self._heart is not None:
            self._heart.stop()
        with suppress(Exception):  # what stays expires
            if self._own():  # the highest goes last: until then nobody else has the lock
                for number in (n for n in self._numbers() if n <= self._number):
                    self._objects.delete(self._path(number))

    def beat(self) -> bool:
        """Give a sign of life; False if another has taken the lock."""
        if self._numbers()[-1:] != [self._number] or not self._own():
            return False
        self._beats += 1
        self._objects.write(self._path(self._number), self._sign())
        return True

    def _take(self, dead: int | None) -> bool:
        """Whether the number behind a dead one, or the first, could be had."""
        number = 0 if dead is None else dead + 1
        if not self._objects.create(self._path(number), self._sign()):
            return False
        numbers = self._numbers()
        # Numbers begin again once all are deleted: one that follows a number of the past is void.
        if numbers[-1:] != [number] or (dead is not None and dead not in numbers):
            self._objects.delete(self._path(number))
            return False
        self._number = number
        self._seen.pop(self._name, None)
        self._heart = Heartbeat(self._name, self.beat, self._seconds / 3)
        return True

    def _own(self) -> bool:
        """Whether the number is still its own: after a death numbers may have begun again."""
        content = self._objects.read(self._path(self._number))
        return content is not None and content.startswith(self._token.encode())

    def _long_dead(self, number: int) -> bool:
        """Whether a lease is so old that no clock can be that wrong."""
        age = self._objects.ages(FOLDER).get(f"{self._name}.{number}", 0.0)
        return age > LONG * self._seconds

    def _sign(self) -> bytes:
        return f"{self._token} {self._beats}".encode()

    def _numbers(self) -> list[int]:
        split = (name.rpartition(".") for name in self._objects.names(FOLDER))
        return sorted(int(n) for name, _, n in split if name == self._name and n.isdigit())

    def _path(self, number: int) -> str:
        return f"{FOLDER}/{self._name}.{number}"
