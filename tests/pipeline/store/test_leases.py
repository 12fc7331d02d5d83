"""Leases in an object store: one holder, who is followed once it gives no sign of life."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.store import spec
from pipeline.store.leases import Lease
from pipeline.store.objects import Objects
from pipeline.store.spec import StoreSpec
from tests.pipeline.store.machines import step

SECONDS = 60.0


class Time:
    """A clock that moves when somebody sleeps, and what happens meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meanwhile: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def objects() -> Iterator[Objects]:
    MemoryFileSystem.store.clear()
    yield Objects("memory://leases")
    MemoryFileSystem.store.clear()


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def lease(objects: Objects, time: Time) -> Iterator[Callable[[], Lease]]:
    made: list[Lease] = []

    def make() -> Lease:
        made.append(Lease(objects, "demo", SECONDS, lambda: time.now, time.sleep))
        return made[-1]

    yield make
    for each in made:
        each.release()


def test_one_holds_until_it_gives_back(objects: Objects, lease: Callable[[], Lease]) -> None:
    first, second = lease(), lease()
    assert first.acquire(wait=False)
    assert not second.acquire(wait=False)
    first.release()
    assert objects.names(".leases") == []
    assert second.acquire(wait=False)
    assert not first.beat(), "it is another's"


def test_a_holder_that_lives_is_waited_for(lease: Callable[[], Lease], time: Time) -> None:
    holder, waiting = lease(), lease()
    assert holder.acquire(wait=False)
    life = 10 * SECONDS

    def meanwhile() -> None:
        if time.now < life:
            assert holder.beat()
        elif time.now < life + 3:
            holder.release()

    time.meanwhile = meanwhile
    assert waiting.acquire(wait=True)
    assert life <= time.now < life + 10


def test_a_dead_holder_is_followed_after_its_seconds(
    lease: Callable[[], Lease], time: Time
) -> None:
    holder, waiting, third = lease(), lease(), lease()
    assert holder.acquire(wait=False)
    assert waiting.acquire(wait=True)
    assert SECONDS < time.now < SECONDS + 10
    assert not holder.beat(), "it learns that it was taken for dead"
    assert waiting.beat()
    holder.release()
    assert not third.acquire(wait=False), "that the first gives back takes nothing from the second"


def test_who_comes_by_again_notices_a_death_without_waiting(
    objects: Objects, time: Time, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = partial(Lease, seconds=SECONDS, clock=lambda: time.now, sleep=time.sleep)
    monkeypatch.setattr(spec, "Lease", timed)
    holding, passing = (StoreSpec(objects.address, str(tmp_path / n)).open() for n in "ab")

    def passed() -> bool:
        with passing.claim(step()) as make:
            return make is not None

    with holding.claim(step()) as make:
        assert make is not None
        for _ in range(4):
            time.now += SECONDS / 4
            assert not passed()
        time.now += SECONDS / 2
        assert passed()


def test_of_two_that_see_the_death_one_follows(
    objects: Objects, lease: Callable[[], Lease], time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lease().acquire(wait=False)
    one, other = lease(), lease()
    create, got = objects.create, []

    def both(path: str, data: bytes) -> bool:
        monkeypatch.setattr(objects, "create", create)
        got.append(other._take(0))  # which has seen the same death
        return create(path, data)

    monkeypatch.setattr(objects, "create", both)
    time.meanwhile = lambda: other.beat() if time.now < 3 * SECONDS else other.release()
    assert one.acquire(wait=True) and got == [True]
    assert time.now >= 3 * SECONDS, "the first waits for the other"


def test_numbers_that_begin_again_are_not_confused(
    objects: Objects, lease: Callable[[], Lease]
) -> None:
    """One that follows a dead holder, when all was given back before it has taken the step."""
    first, late = lease(), lease()
    assert first.acquire(wait=False)
    first.release()
    assert not late._take(0), "number 1 follows a number 0 that is no more"
    assert objects.names(".leases") == []
    assert first.acquire(wait=False) and first.beat()


def test_exactly_one_of_many_interleavings(objects: Objects, lease: Callable[[], Lease]) -> None:
    """Two that find nothing, in every order of their creating and looking."""
    for order in set(itertools.permutations("aabb")):
        takers = {"a": lease(), "b": lease()}
        created: dict[str, bool] = {}
        held = []
        for name in order:
            taker = takers[name]
            if name not in created:
                created[name] = objects.create(".leases/demo.0", taker._sign())
            elif created[name]:
                held.append(name)
        assert len(held) == 1
        objects.delete(".leases/demo.0")
