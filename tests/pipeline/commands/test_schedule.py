"""Who builds what when: schedules by hand, and what holds of any."""

from __future__ import annotations

import random

import pytest

from pipeline.commands.schedule import Cost, Load, schedule


def load(*seconds: float, once: float = 0.0, merge: float = 0.0) -> Load:
    units = tuple(Cost(compute=each) for each in seconds)
    return Load(units, {"kernels": Cost(fixed=once)} if once else {}, Cost(network=merge))


def ends(
    workers: int, loads: dict[str, Load], begin: float = 0.0, **after: str
) -> dict[str, float]:
    """When each stage is there; `after` names the stages, one letter each, that one waits for."""
    before = {name: {*after.get(name, "")} for name in loads}
    return {name: done.end for name, done in schedule(loads, before, workers, begin).items()}


def test_schedules_are_computed_by_hand():
    both = {"a": load(10), "b": load(10)}
    assert ends(1, both) == {"a": 10, "b": 20}
    assert ends(2, both) == {"a": 10, "b": 10}  # side by side
    assert ends(2, both, begin=7) == {"a": 17, "b": 17}
    assert ends(2, both, b="a") == {"a": 10, "b": 20}  # a chain
    assert ends(2, {"a": load(4, 4, 4)}) == {"a": 8}  # two rounds
    assert ends(3, {"a": load(4, 4, 4)}) == {"a": 4}
    assert ends(4, {"a": load(4, 4, 4), "b": load(3)}) == {"a": 4, "b": 3}


def test_each_worker_prepares_once_and_the_last_merges():
    three = {"a": load(4, 4, 4, once=1, merge=2)}
    assert ends(1, three) == {"a": 15}
    assert ends(2, three) == {"a": 11}  # 1 + 4 + 4 + 2
    done = schedule(three, {"a": set()}, 2)["a"]
    assert {who: cost.seconds for who, cost in done.costs.items()} == {0: 11, 1: 5}
    assert (done.most.seconds, done.all.seconds) == (11, 16)
    assert (done.all.compute, done.all.fixed, done.all.network) == (12, 2, 2)
    two = {"a": load(4, once=1), "b": load(2, once=1)}  # what one has prepared serves for the other
    assert ends(1, two) == {"a": 5, "b": 7}
    assert ends(2, two) == {"a": 5, "b": 3}


def test_a_worker_builds_what_does_not_wait_for_another():
    # The second merges from 5 to 8 and goes on to c, while the first is at b.
    loads = {"a": load(4, 5, merge=3), "c": load(2), "b": load(10)}
    assert ends(2, loads, c="a") == {"a": 8, "c": 10, "b": 14}
    # One alone goes on from its place in the order and comes back to what has become ready meanwhile.
    loads = {"a": load(1), "b": load(1), "c": load(1)}
    assert ends(1, loads, a="b") == {"b": 1, "c": 2, "a": 3}


def test_workers_begin_at_their_part_of_the_units():
    # The second begins with 4, so that the first takes 5 behind 1 and 2.
    assert ends(2, {"a": load(1, 2, 4, 5)}) == {"a": 8}


def test_no_schedule_is_longer_than_that_of_one_worker_or_shorter_than_its_bounds():
    draw = random.Random(0)
    for _ in range(300):
        names = "abcdefg"[: draw.randint(1, 7)]
        units = [[draw.uniform(0.1, 9) for _ in range(draw.randint(1, 5))] for _ in names]
        loads = {n: load(*each) for n, each in zip(names, units, strict=True)}
        after: dict[str, set[str]] = {}
        path: dict[str, float] = {}  # the longest that ends with a stage
        for place, name in enumerate(names):
            after[name] = {each for each in names[:place] if draw.random() < 0.3}
            path[name] = max(units[place]) + max((path[b] for b in after[name]), default=0.0)
        whole, workers = sum(map(sum, units)), draw.randint(1, 5)
        done = schedule(loads, after, workers)
        end = max(each.end for each in done.values())
        assert end <= whole + 1e-9
        assert end >= max(*path.values(), whole / workers) - 1e-9
        assert sum(each.all.seconds for each in done.values()) == pytest.approx(whole)
        for name in names:
            assert done[name].end >= max((done[b].end for b in after[name]), default=0.0)
        alone = schedule(loads, after, 1)
        assert max(each.end for each in alone.values()) == pytest.approx(whole)
