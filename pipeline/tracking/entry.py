"""What a tracking database is told of one run: names and values, nothing of MLflow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Text:
    """A data set that a run read: `context` says what for, `digest` tells its content."""

    name: str
    digest: str
    context: str
    source_type: str
    source: Mapping[str, Any]
    profile: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """What the database is told of one run.

    `identity` are tags that only this run has, `started` and `ended` seconds since 1970. Numbers of
    `result` become metrics, nested names joined by `/`, its strings tags; an infinite or undefined
    number is the tag `nonfinite.<metric>`, because MLflow would store it as 1.8e308. `documents`
    are texts and `tables` frames by artifact name, `files` paths by artifact folder.
    """

    name: str
    identity: Mapping[str, str]
    started: float
    ended: float
    status: str = "FINISHED"
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    data: Sequence[Text] = ()
    documents: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)


def measured(entry: Entry) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics and tags of an entry."""
    metrics: dict[str, float] = {}
    tags = dict(entry.tags)
    for name, value in flat(entry.result):
        if isinstance(value, int | float) and math.isfinite(value):
            metrics[name] = float(value)
        elif isinstance(value, int | float):
            tags[f"nonfinite.{name}"] = str(value)
        elif value is not None:
            tags[name] = str(value)
    return metrics, tags


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
