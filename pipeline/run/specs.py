"""Where runs are logged and what a plan predicts with, as the configuration says it; no MLflow is needed
to read that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stages.errors import InputError

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")  # of weights, as stages.model.loading has them
OVERHEAD = (
    *(
        "start",
        "finish",
        "compile",
        "compile_coded",
        "compile_graphs",
        "cold",
        "process",
        "load",
        "stage",
        "elements",
        "dense",
        "dense_counted",
        "capture",
    ),
    *(
        "patching",
        "spiking",
        "counted",
        "step",
        "distribution",
        "fitting",
        "trained",
        "sampled",
        "task",
        "energy",
    ),
)
PASSES = ("sensitivity", "smoothing", "products")
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")


@dataclass(frozen=True)
class TrackingSpec:
    """Where runs are logged: `sqlite:///outputs/mlflow/mlflow.db` or a server's address.

    `artifacts` is the folder of the tables and figures beside a database, which may move with it; a
    server uses its own.
    `patience` is how many seconds logging one run may take before it is left to a later sync.
    Raises InputError for an address that MLflow cannot log to.
    """

    uri: str
    experiment: str
    artifacts: str
    enabled: bool = True
    patience: float = 20.0

    def __post_init__(self) -> None:
        scheme = urlsplit(self.uri).scheme.partition("+")[0]
        if scheme not in SCHEMES or (scheme == "sqlite" and self.database is None):
            raise InputError(
                f"tracking.uri={self.uri} names no file or server of {', '.join(SCHEMES)}: give "
                "sqlite:///FOLDER/mlflow.db or a server's address"
            )

    @property
    def database(self) -> Path | None:
        """The file of a sqlite database; None of a server."""
        parts = urlsplit(self.uri)
        named = parts.scheme.startswith("sqlite") and parts.path[1:]
        return Path(named) if named else None


@dataclass(frozen=True)
class PlanSpec:
    """What a plan predicts with; part of no key.

    `reference`: rates of a known machine by device, where none are given or measured. `overhead`: what
    stages cost beside the products of the dense model, by device. `passes` of a statistic over the model,
    `questions` of a task: sequences of each, and their tokens.
    """

    measure: bool
    flops: float | None
    memory: float | None
    disk: float | None
    network: float
    reference: Mapping[str, Mapping[str, Any]]
    overhead: Mapping[str, Mapping[str, float]]
    passes: Mapping[str, float]
    questions: Mapping[str, Sequence[int]]

    def __post_init__(self) -> None:
        for name in ("flops", "memory", "disk", "network"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"plan.{name}={value}: give a rate a second above 0")
        _check_keys("plan.reference", self.reference, DEVICES, every=False)
        _check_keys("plan.overhead", self.overhead, DEVICES, every=False)
        for device, known in self.reference.items():
            at = f"plan.reference.{device}"
            _check_keys(at, known, ("machine", "date", "flops", "memory", "disk"))
            _check_keys(f"{at}.flops", known["flops"], DTYPES, every=False)
            _check_numbers(f"{at}.flops", known["flops"], above=True)
            _check_numbers(at, {name: known[name] for name in ("memory", "disk")}, above=True)
        for device, costs in self.overhead.items():
            _check_keys(f"plan.overhead.{device}", costs, OVERHEAD)
            _check_numbers(f"plan.overhead.{device}", costs)
        _check_keys("plan.passes", self.passes, PASSES, every=False)
        _check_numbers("plan.passes", self.passes)
        for task, size in self.questions.items():
            if not isinstance(size, Sequence) or len(size) != 2 or not all(map(_positive, size)):
                raise InputError(
                    f"plan.questions.{task}={size}: give the sequences of a question and their tokens, "
                    "[4, 60]"
                )


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _check_numbers(option: str, given: Mapping[str, Any], above: bool = False) -> None:
    """Raises InputError unless the values are finite numbers, 0 or `above` it."""
    for name, value in given.items():
        if not _positive(value) and (above or type(value) not in (int, float) or value != 0):
            raise InputError(
                f"{option}.{name}={value}: give a finite number {'above 0' if above else 'of 0 or more'}"
            )


def _check_keys(
    option: str, given: Mapping[str, Any], known: Sequence[str], every: bool = True
) -> None:
    """Raises InputError unless the keys of a mapping are known, and `every` one of them is there."""
    odd = [*({*given} - {*known}), *({*known} - {*given} if every else ())]
    if odd:
        said = "give each of" if every else "choose among"
        raise InputError(f"{option}.{odd[0]}: {said} {', '.join(known)}")
