"""A stage, declared once: what determines its artifact, and how that is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pipeline.store.code import source_hash
from pipeline.store.step import Step
from pipeline.store.store import Artifact, Store


class Source(Protocol):
    """What a stage may be made from: another stage's artifact, a model, a text, a file of questions.

    `key` identifies its content, wherever that lies; `inputs` are what it is made from itself.
    """

    @property
    def inputs(self) -> Mapping[str, Source]: ...

    def key(self) -> str: ...

    def open(self, store: Store, runtime: Running | None) -> Any:
        """What `make` reads: an artifact, or an object that loads what is meant."""


class Opened(Mapping[str, Any]):
    """The inputs of a stage while it is made, each opened when it is asked for."""

    def __init__(
        self, sources: Mapping[str, Source], store: Store, runtime: Running | None
    ) -> None:
        self._sources, self._store, self._runtime = sources, store, runtime

    def __getitem__(self, name: str) -> Any:
        return self._sources[name].open(self._store, self._runtime)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


@dataclass(frozen=True)
class Running:
    """How the stages of a run are made, not what they are: in no key, but in every manifest."""

    device: str
    batch: int
    evaluation_batch: int
    task_batch: int
    execution: str
    command: str  # that an exported model says it was made by
    compile: bool = True

    @classmethod
    def of(cls, runtime: Any, device: str, command: str) -> Running:
        """The runtime of a configuration on the device that was chosen."""
        sizes = (runtime.batch, runtime.evaluation_batch, runtime.task_batch)
        return cls(device, *sizes, runtime.execution, command, runtime.compile)


@dataclass(frozen=True, eq=False)
class Stage:
    """One artifact: `spec` and the keys of `inputs` are hashed, with the code that computes it.

    A subclass is the declaration of a stage. `make` writes the artifact's files into the folder `out`.
    It is a static method and gets the spec, the inputs and the runtime: a setting that is not in the
    spec, and so not in the key, is out of its reach.
    """

    name: ClassVar[str]  # also the folder in the store
    code: ClassVar[tuple[str, ...]] = ()  # modules of `stages` that compute it

    spec: Any  # plain values and dataclasses, see `pipeline.store.step.plain`
    inputs: Mapping[str, Source] = field(default_factory=dict)
    part: str = ""  # of a stage with several artifacts in a run: `ppl_wikipedia`

    def __init_subclass__(cls) -> None:
        make = cls.__dict__.get("make")
        if make is not None and (not isinstance(make, staticmethod) or make.__func__.__closure__):
            raise TypeError(f"{cls.__name__}.make must be a static method without a closure")

    @staticmethod
    def make(out: Path, spec: Any, inputs: Mapping[str, Any], runtime: Any) -> None:
        raise NotImplementedError

    @property
    def label(self) -> str:
        """What logs, plans and results call it."""
        return f"{self.name} {self.part}".rstrip()

    def modules(self) -> tuple[str, ...]:
        """The modules whose code is in the key."""
        return self.code

    @property
    def made_by(self) -> str:
        """The hash of the functions that call the modules."""
        return source_hash(type(self).make)

    @cached_property
    def step(self) -> Step:
        keys = {name: source.key() for name, source in self.inputs.items()}
        made_by = self.made_by if self.modules() else ""
        return Step(self.name, self.spec, keys, self.modules(), made_by)

    @cached_property
    def _key(self) -> str:
        return self.step.key()

    def key(self) -> str:
        """The name of the artifact in the store."""
        return self._key

    def build(self, store: Store, runtime: Running | None) -> Artifact:
        """The artifact from the store; if need be it is made, its inputs first."""
        return store.build(self.step, self.maker(store, runtime))

    def maker(self, store: Store, runtime: Running | None) -> Callable[[Path], None]:
        """What writes the files of the artifact into a folder."""
        opened = Opened(self.inputs, store, runtime)
        return partial(type(self).make, spec=self.spec, inputs=opened, runtime=runtime)

    def open(self, store: Store, runtime: Running | None) -> Artifact:
        return self.build(store, runtime)


def sources(stage: Source) -> Iterator[Stage]:
    """All stages that a stage is made from, each behind its own."""
    for source in stage.inputs.values():
        yield from sources(source)
        if isinstance(source, Stage):
            yield source
