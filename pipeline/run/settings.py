"""The root of a configuration as frozen dataclasses; nothing behind it sees a DictConfig."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.run.errors import choose
from pipeline.run.specs import PlanSpec, TrackingSpec
from pipeline.store.spec import StoreSpec
from stages.capture import Capture
from stages.codings.base import Coding
from stages.distribution import Distribution
from stages.energy import Energy
from stages.errors import InputError
from stages.evaluation import Evaluation
from stages.export import Export
from stages.fitting import Fitting
from stages.model.offload import Offload
from stages.model.sites import SiteSelection
from stages.model.spec import ModelSpec
from stages.patching import Patching
from stages.text.corpus import Corpus
from stages.text.harness import TaskSpec
from stages.transforms.transform import Transform

ENTRIES: dict[str, Any] = {"corpus": Corpus, "tasks": TaskSpec}  # groups whose entries have names
EXECUTIONS = ("fast", "stepped")  # those of `stages.ports.patched`
ENGINES = ("local", "ray", "slurm")  # those of `pipeline.run.engines`
MEANS = ("mean", "ppl_mean", "acc_mean")  # that a paper's tables call means over texts and tasks


@dataclass(frozen=True)
class Calibration:
    """`windows` windows of `length` tokens of a corpus' calibration part."""

    corpus: str
    windows: int
    length: int

    def __post_init__(self) -> None:
        if self.windows < 1 or self.length < 2:
            raise InputError(
                f"calibration: got windows={self.windows}, length={self.length}; needs 1 window of "
                "2 tokens at least"
            )


@dataclass(frozen=True)
class TableSpec:
    """The columns of the printed table, of its Markdown and LaTeX; the csv has all. Part of no key."""

    columns: Sequence[str] | None
    wide: bool

    def __post_init__(self) -> None:
        if self.columns is not None and not self.columns:
            raise InputError("table.columns=[]: give names of columns, or null for the usual ones")


@dataclass(frozen=True)
class Runtime:
    """How a run is carried out: never part of a key, recorded in every manifest."""

    device: str
    devices: Sequence[str] | None
    batch: int
    evaluation_batch: int
    task_batch: int
    compile: bool
    execution: str
    offload: Offload | None
    figures: bool
    plan: bool
    workers: int = 1
    engine: str = "local"
    cluster: Mapping[str, Any] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "evaluation_batch", "task_batch", "workers", "threads"):
            if (got := getattr(self, name)) is not None and got < 1:
                raise InputError(f"runtime.{name}={got}: give 1 or more")
        if self.execution not in EXECUTIONS:
            raise InputError(
                f"runtime.execution={self.execution!r}: choose {' or '.join(EXECUTIONS)}"
            )
        if self.engine not in ENGINES:
            raise InputError(f"runtime.engine={self.engine!r}: choose {' or '.join(ENGINES)}")
        if self.cluster is not None and self.engine == "local":
            raise InputError(
                f"runtime.cluster={dict(self.cluster)}: processes of this machine have none; "
                "give runtime.engine=ray or slurm"
            )
        if self.devices is not None:
            self._check(self.devices)

    def _check(self, devices: Sequence[str]) -> None:
        given = f"runtime.devices={devices}"
        names = [] if isinstance(devices, str) else [n for n in devices if ":" in str(n)]
        if not names or len({*names}) < len(devices):
            raise InputError(f"{given}: give a list of different devices, as [cuda:0,cuda:1]")
        if self.device not in ("auto", *names):
            raise InputError(f"{given} and runtime.device={self.device}: give one of the two")
        if self.workers > 1 and self.engine != "local":
            raise InputError(
                f"{given} and runtime.engine={self.engine}: a worker of a cluster sees its own GPU alone; "
                "give runtime.devices=null"
            )
        if self.workers > len(devices):
            raise InputError(
                f"{given} for runtime.workers={self.workers}: give each its own device"
            )


@dataclass(frozen=True)
class Settings:
    """One run; `timesteps` is what the codings refer to that leave their own T open.

    Raises InputError where a name is chosen that the mappings lack.
    """

    model: ModelSpec
    corpus: Mapping[str, Corpus]
    transform: Transform
    tasks: Mapping[str, TaskSpec]
    calibration: Calibration
    sites: SiteSelection
    capture: Capture
    distribution: Distribution
    coding: Coding
    fitting: Fitting
    patching: Patching
    evaluation: Evaluation
    energy: Energy
    export: Export
    store: StoreSpec
    runtime: Runtime
    tracking: TrackingSpec
    table: TableSpec
    plan: PlanSpec
    row: str | None
    timesteps: int

    def __post_init__(self) -> None:
        for group in ENTRIES:
            made = {name: entry(group, name, given) for name, given in getattr(self, group).items()}
            object.__setattr__(self, group, made)
        corpora = {"calibration.corpus": [self.calibration.corpus]}
        corpora["evaluation.corpora"] = list(self.evaluation.corpora)
        for option, names in corpora.items():
            _known(option, names, self.corpus)
        _known("evaluation.tasks", self.evaluation.tasks, self.tasks)
        for name in (*self.evaluation.corpora, *self.evaluation.tasks):
            if name in MEANS:
                raise InputError(
                    f"evaluation: {name} is what the tables of a paper call a mean; give another name"
                )
        if self.energy.models and self.transform.search is not None:
            raise InputError(
                f"energy.models with transform={self.transform.name}: the prefix of another model is not "
                "known; give energy.models=[], or another transform"
            )
        if self.export.enabled and not self.coding.converts:
            raise InputError("export.enabled=true with coding=dense: there is nothing to export")

    def check_places(self) -> None:
        """Raises InputError where the store or the export has no place to write to."""
        writable("store.cache" if self.store.remote else "store.path", self.store.folder)
        self.store.open().check()
        if self.export.enabled and self.export.folder is not None:
            writable("export.folder", Path(self.export.folder).expanduser())

    def check_offloaded(self) -> None:
        """Raises InputError where a stage, hours later, would refuse a model that is not in memory."""
        if self.runtime.offload is None:
            return
        whole = [s.name for s in self.coding.statistics if s.whole_model]
        refused = {
            "evaluation.tasks": ("[]", self.evaluation.tasks),
            "transform": ("none", self.transform.name != "none" and self.transform.name),
            "coding": ("gated, or another that asks no gradients of the model", whole),
        }
        for option, (instead, got) in refused.items():
            if got:
                raise InputError(
                    f"runtime=offload keeps one layer in memory, and {option} ({got}) needs the whole "
                    f"model: give {option}={instead}, or runtime=default"
                )

    @property
    def name(self) -> str:
        """What the run is called in logs and in the dashboard."""
        coding, name = self.coding, self.row or self.coding.name
        if coding.converts:
            name += f" T={coding.timesteps} n={coding.grains}"
        return name if self.transform.name == "none" else f"{name} {self.transform.name}"

    @property
    def axes(self) -> dict[str, Any]:
        """What a sweep varies, by the names that tables and the dashboard use."""
        dense = not self.coding.converts
        return {
            "model": self.model.name,
            "transform": self.transform.name,
            "coding": self.coding.name,
            "row": self.row or self.coding.name,
            "grains": None if dense else self.coding.grains,
            "timesteps": None if dense else self.coding.timesteps,
            "corpus": self.calibration.corpus,
            "seed": self.fitting.seed,
        }


def entry(group: str, name: str, given: Any) -> Corpus | TaskSpec:
    """An entry of a group; one that the command line added has its own keys and the defaults.

    Raises InputError for a key that such an entry does not have.
    """
    kind = ENTRIES[group]
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise InputError(f"{group}.{name}={given!r} is no {kind.__name__}: give its keys")
    keys = [field.name for field in fields(kind) if field.name != "name"]
    if unknown := [key for key in given if key not in keys]:
        raise InputError(f"{group}.{name}.{unknown[0]}: no such key; {choose(unknown[0], keys)}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.name != "name"]
    if absent := [key for key in needed if key not in given]:
        raise InputError(f"{group}.{name} is no {kind.__name__} without {group}.{name}.{absent[0]}")
    made: Corpus | TaskSpec = kind(name=name, **given)
    return made


def writable(option: str, folder: Path) -> None:
    """Raises InputError where nothing can be written to a folder, or where it cannot be made."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=nearest):
            return
    except OSError as error:
        raise InputError(
            f"{option}={folder}: nothing can be written to {nearest} ({error.strerror}); give another "
            "folder"
        ) from None


def _known(option: str, names: Any, mapping: Mapping[str, Any]) -> None:
    unknown = [name for name in names if name not in mapping]
    if unknown:
        raise InputError(f"{option}: got {', '.join(unknown)}; {choose(unknown[0], [*mapping])}")
