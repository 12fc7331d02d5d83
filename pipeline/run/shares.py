"""A stage whose work several processes share: units that each are an artifact until all are merged.

What a unit is does not depend on how many processes there are, and units are merged in their order: the
artifact is that of one process, bit for bit. A unit is built under its lock, which the system takes back
when its builder dies, so that whoever asks next builds it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.run.stage import Opened, Running, Stage
from pipeline.store.code import source_hash
from pipeline.store.step import Step
from pipeline.store.store import SHARES, Artifact, Store
from stages.model.shares import Share, save

log = logging.getLogger(__name__)


@dataclass
class Claimed:
    """A unit that this process builds; `leave` writes it and lets go of its lock."""

    number: int
    _make: Callable[..., Artifact]
    _lock: ExitStack
    _clock: Callable[[], float]

    def leave(self, write: Callable[[Path], None]) -> None:
        self._make(write, spent=self._clock())
        self._lock.close()


class Cut(Stage):
    """A stage that is cut into units. Beside `make`, which makes all of it, a subclass declares how many
    there are, how `share` makes those that are claimed, one at least, and how `merge` makes the artifact
    of the folders of all, in their order, with the bytes of `make`."""

    @staticmethod
    def units(spec: Any, inputs: Mapping[str, Any], runtime: Any) -> int:
        raise NotImplementedError

    @staticmethod
    def share(
        claims: Iterable[Claimed], spec: Any, inputs: Mapping[str, Any], runtime: Any
    ) -> None:
        raise NotImplementedError

    @staticmethod
    def merge(
        out: Path, parts: Sequence[Path], spec: Any, inputs: Mapping[str, Any], runtime: Any
    ) -> None:
        raise NotImplementedError

    @property
    def made_by(self) -> str:
        kind = type(self)
        return source_hash(kind.make, kind.units, kind.share, kind.merge)


def batches(windows: int, batch: int) -> int:
    """How many batches so many windows are."""
    return -(-windows // batch)


def passing(ids: Tensor, batch: int, claims: Iterable[Claimed]) -> Iterator[Share]:
    """The batches of ids [W, S] that are claimed, each of which leaves its part in its unit."""
    parts = ids.split(batch)
    for claimed in claims:
        yield Share(claimed.number, parts[claimed.number], partial(_leave, claimed))


def _leave(claimed: Claimed, part: dict[str, Tensor]) -> None:
    claimed.leave(partial(save, part))


@dataclass(frozen=True)
class Shared:
    """The units of a stage in a store, for a way of running it: those of another do not mix with them."""

    stage: Cut
    store: Store
    runtime: Running

    @cached_property
    def _inputs(self) -> Opened:
        return Opened(self.stage.inputs, self.store, self.runtime)

    @cached_property
    def number(self) -> int:
        """How many units there are; what the stage is made from must be there."""
        return type(self.stage).units(self.stage.spec, self._inputs, self.runtime)

    @cached_property
    def steps(self) -> list[Step]:
        """What determines each unit."""
        return [_step(self.stage, self.runtime, number) for number in range(self.number)]

    @property
    def there(self) -> list[int]:
        """The units that are built."""
        return [number for number in range(self.number) if self._holds(number)]

    def _holds(self, number: int) -> bool:
        return self.store.holds(SHARES, self.steps[number].key())

    @cached_property
    def _paths(self) -> list[Path]:
        return [self.store.root / SHARES / step.key() for step in self.steps]

    @property
    def _stands(self) -> bool:
        return self.store.holds(self.stage.name, self.stage.key())

    def work(self, start: float, most: int | None = None) -> bool:
        """Build what units are missing and no other process builds, `most` of them where that is given,
        beginning at the part `start` of them; whether there were any."""
        with self._claims(start) as claims:
            first = next(claims, None)
            if first is None:
                return False
            some = islice(chain([first], claims), most)
            type(self.stage).share(some, self.stage.spec, self._inputs, self.runtime)
        return True

    @contextmanager
    def _claims(self, start: float) -> Iterator[Iterator[Claimed]]:
        first = int(start * self.number)
        order = [*range(first, self.number), *range(first)]
        last = time.perf_counter()

        def clock() -> float:
            """Seconds since the unit before."""
            nonlocal last
            before, last = last, time.perf_counter()
            return last - before

        def claims(held: ExitStack) -> Iterator[Claimed]:
            for number in order:
                if self._holds(number) or self._stands:
                    continue
                with ExitStack() as lock:
                    make = lock.enter_context(self.store.claim(self.steps[number]))
                    if make is None or self._stands:  # built meanwhile, and the units are gone
                        continue
                    kept = held.enter_context(lock.pop_all())
                yield Claimed(number, make, kept, clock)

        with ExitStack() as held:
            yield claims(held)

    def merge(self) -> Artifact | None:
        """The artifact once all units are there; None if they are not, or another process merges them."""
        if len(self.there) < self.number:
            return None
        stage = self.stage
        with self.store.claim(stage.step) as make:
            if make is None:
                return None
            parts = [self.store.find(step) for step in self.steps]
            whole = [part for part in parts if part is not None]
            if len(whole) < self.number:
                for path in (p for p, part in zip(self._paths, parts, strict=True) if part is None):
                    self.store.remove(path)  # damaged: it is built again
                return None
            folders = [part.path for part in whole]
            merge = partial(type(stage).merge, parts=folders, spec=stage.spec)
            write = partial(merge, inputs=self._inputs, runtime=self.runtime)
            artifact = make(write, spent=sum(part.seconds for part in whole))
        self.remove()
        return artifact

    def remove(self) -> None:
        """Delete the units of an artifact that stands, and their locks."""
        for step, path in zip(self.steps, self._paths, strict=True):
            self.store.remove(path)
            self.store.forget(step)

    def tidy(self) -> None:
        """Delete those of an artifact that stands which this machine has in a cache of its own, where
        asking for one another has built brings it too, and their locks."""
        for step, path in zip(self.steps, self._paths, strict=True):
            if path.is_dir():
                self.store.remove(path)
            self.store.forget(step)


def _step(stage: Stage, runtime: Running, number: int) -> Step:
    how = asdict(runtime)
    how.pop("command")
    how["device"] = how["device"].partition(":")[0]
    spec = {"stage": stage.name, "key": stage.key(), "unit": number, "runtime": how}
    return Step(SHARES, spec, {}, ())
