"""What each worker of a conversion does, and until when: of stages whose costs are known."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, fields
from heapq import heapify, heappop, heappush


@dataclass(frozen=True)
class Cost:
    """Seconds by what takes them: `compute`, `memory`, `disk`, `network`, and `fixed`, whatever its size;
    bytes that are read as weights, that are sent through the store, and that a worker holds."""

    compute: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    network: float = 0.0
    fixed: float = 0.0
    read: float = 0.0
    sent: float = 0.0
    held: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Of one after the other, which share the memory."""
        both = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Cost(**(both | {"held": max(self.held, other.held)}))

    @property
    def seconds(self) -> float:
        """What is computed, while the next layer is read, and what is sent."""
        return self.fixed + max(self.compute + self.memory, self.disk) + self.network

    @property
    def bound(self) -> str:
        """What takes most of it."""
        parts = {name: getattr(self, name) for name in ("compute", "memory", "disk", "network")}
        return max({**parts, "start": self.fixed}.items(), key=lambda part: part[1])[0]


@dataclass(frozen=True)
class Load:
    """A stage as workers take it: units, of which each is built by any of them, what a worker has to have
    done `once`, by name, before its first, and what the one that builds the last does to `merge` all."""

    units: tuple[Cost, ...]
    once: Mapping[str, Cost] = field(default_factory=dict)
    merge: Cost = Cost()


@dataclass
class Done:
    """What a stage has cost each of the workers that took part, and when it was there."""

    costs: dict[int, Cost] = field(default_factory=dict)
    end: float = 0.0

    @property
    def most(self) -> Cost:
        """Of the worker that had most to do."""
        return max(self.costs.values(), key=lambda cost: cost.seconds)

    @property
    def all(self) -> Cost:
        """Of all workers together."""
        return sum(self.costs.values(), Cost())


def schedule(
    loads: Mapping[str, Load], after: Mapping[str, Set[str]], workers: int, begin: float = 0.0
) -> dict[str, Done]:
    """What becomes of stages, each `after` others, on workers that all begin at once.

    Each takes units of a stage as `pipeline.run.peers` does: while there are any, then those of the next
    stage whose inputs are there, from its place in their order on; it waits while there is none.
    """
    names = [*loads]
    left = {name: dict(enumerate(load.units)) for name, load in loads.items()}
    building = {name: len(load.units) for name, load in loads.items()}
    done = {name: Done() for name in loads}
    there: set[str] = set()
    prepared: list[set[str]] = [set() for _ in range(workers)]
    waiting: list[int] = []
    # When a worker is free, which, at what place of the order, and the stage whose unit it has built.
    free = [(begin, worker, 0, "") for worker in range(workers)]
    while free:
        now, worker, place, built = heappop(free)
        if built:
            building[built] -= 1
            if building[built] == 0:  # it merges, which is one unit more
                done[built].costs[worker] += (merge := loads[built].merge)
                heappush(free, (now + merge.seconds, worker, place, built))
                continue
            if building[built] < 0:
                done[built].end = now
                there.add(built)
                free += [(now, other, 0, "") for other in waiting]
                heapify(free)
                waiting.clear()
        order = names[place:] + names[:place]
        name = next((each for each in order if left[each] and after[each] <= there), None)
        if name is None:
            waiting.append(worker)
            continue
        load, costs = loads[name], done[name].costs
        first = worker * len(load.units) // workers
        unit = min(left[name], key=lambda number: (number - first) % len(load.units))
        cost = left[name].pop(unit)
        new = load.once.keys() - prepared[worker]
        prepared[worker] |= new
        cost = sum((load.once[each] for each in new), cost)
        costs[worker] = costs.get(worker, Cost()) + cost
        heappush(free, (now + cost.seconds, worker, names.index(name), name))
    return done
