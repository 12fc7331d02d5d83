"""See, check and clean an artifact store."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline.store.manifest import Damaged
from pipeline.store.objects import Away
from pipeline.store.shared import SharedStore
from pipeline.store.spec import StoreSpec
from pipeline.store.store import SHARES, Store
from stages.errors import InputError


def status(spec: Mapping[str, str], work: Callable[[Store], int], new: bool = False) -> int:
    """Do something with the store of a configuration, which may be a `new` one; returns its exit status, 2
    for bad input and for a store that does not answer."""
    try:
        store = StoreSpec.of(spec).open()
        if new:
            store.check()
        else:
            store.reach()
        done = work(store)
        sys.stdout.flush()
        return done
    except (InputError, Away) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `ls | head` has read enough; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def ls(store: Store) -> int:
    """List all artifacts: stage, key, size, age and the seconds that the build took."""
    print(f"{'stage':<16} {'key':<32} {'MB':>10} {'age':>18} {'seconds':>9}")
    for path, record in store.records(store.folders()).items():
        print(_line(path, record))
    return 0


def show(store: Store, key: str) -> int:
    """Print the manifest of the artifact whose key begins with `key`."""
    artifacts = [path for path in store.folders() if path.name.startswith(key)]
    if len(artifacts) != 1:
        raise InputError(
            f"{len(artifacts)} artifacts in {store.name} have a key that starts with "
            f"{key}; give one that `ls` prints"
        )
    record = store.records(artifacts)[artifacts[0]]
    if record is None:
        raise InputError(f"artifact {artifacts[0]} is damaged: its manifest cannot be read")
    print(json.dumps(record, indent=2))
    return 0


def verify(store: Store) -> int:
    """Compare every file of every artifact with its manifest; returns 1 if one is damaged."""
    damaged, paths = 0, store.folders()
    for path in paths:
        try:
            store.verify(path)
        except Damaged as fault:
            damaged += 1
            print(f"damaged  {path.parent.name}/{path.name}: {fault}")
        else:
            print(f"whole    {path.parent.name}/{path.name}")
    print(f"{len(paths)} artifacts, {damaged} damaged")
    return 1 if damaged else 0


def push(store: Store) -> int:
    """Upload what the cache of a shared store alone holds."""
    if not isinstance(store, SharedStore):
        raise InputError(
            f"{store.name} is a folder; give an address with --store, as s3://BUCKET/FOLDER"
        )
    sent = store.push()
    for path in sent:
        print(f"uploaded  {path.parent.name}/{path.name}")
    print(f"{len(sent)} artifacts that were in {store.root} alone")
    return 0


def gc(
    store: Store,
    days: float | None,
    keep_file: Path | None,
    experiments: Sequence[Sequence[str]],
    delete: bool,
) -> int:
    """Preview or delete what is neither young enough, nor named, nor an input of what is; what a run is at
    work with stays.

    `experiments` are names with the overrides of each.
    """
    doomed = store.orphans() + _merged(store)
    if days is not None or keep_file is not None or experiments:
        named = set() if keep_file is None else _named(keep_file)
        for experiment in experiments:
            named |= _reachable(store, experiment)
        kept = [f"--keep {shlex.quote(shlex.join(words))}" for words in experiments]
        kept += [] if keep_file is None else [f"--keep-file {keep_file}"]
        doomed += [p for p in _unneeded(store, days, named, " ".join(kept)) if p not in doomed]
    records = store.records([path for path in doomed if not path.name.startswith(".")])
    for path in doomed:
        line = _line(path, records.get(path))
        done = "would delete"
        if delete:
            done = "deleted" if store.remove(path) else "in use, kept"
        print(f"{done:<13} {line}")
    print(f"{len(doomed)} folders" + ("" if delete else "; --yes deletes them"))
    return 0


def _merged(store: Store) -> list[Path]:
    """Shares of artifacts that are there, left by workers that were killed."""
    left = store.records([path for path in store.folders() if path.parent.name == SHARES])
    of = {path: record["spec"] for path, record in left.items() if record}
    return [path for path, spec in of.items() if store.holds(spec["stage"], spec["key"])]


def _unneeded(store: Store, days: float | None, named: set[str], source: str) -> list[Path]:
    """Folders of the artifacts that no younger, no named one and no run needs, and of unreadable ones."""
    known = store.records(store.folders())
    if source and not named & {path.name for path in known}:
        raise InputError(
            f"nothing that {source} names is in {store.name}; this would delete everything"
        )
    roots = named | store.used()
    if days is not None:
        roots |= {path.name for path, record in known.items() if record and _age(record) < days}
    inputs = {
        path.name: list(record["inputs"].values()) for path, record in known.items() if record
    }
    for path, record in known.items():
        if record and record["stage"] == SHARES:  # needed by what they are shares of
            inputs.setdefault(record["spec"]["key"], []).append(path.name)
    needed = _closure(roots, inputs)
    return [path for path, record in known.items() if record is None or path.name not in needed]


def _reachable(store: Store, experiment: Sequence[str]) -> set[str]:
    """Keys of all that an experiment's jobs use, from the model's file to the energy."""
    from pipeline.run.chain import chain
    from pipeline.run.errors import REFUSED, one_line
    from pipeline.run.jobs import jobs

    name, *overrides = experiment
    try:
        chains = [chain(job.settings, store) for job in jobs([f"experiment={name}", *overrides])]
    except REFUSED as error:
        raise InputError(one_line(error)) from None
    return {step.key() for each in chains for step in (each.sources | each.steps).values()}


def _named(keep_file: Path) -> set[str]:
    """The keys in a file, one a line; empty lines and what follows a # do not count."""
    try:
        lines = keep_file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {keep_file}: {error}; give a text file of keys") from None
    keys = {key for line in lines if (key := line.partition("#")[0].strip())}
    for key in keys:
        if len(key) != 32 or not set(key) <= set("0123456789abcdef"):
            raise InputError(f"{keep_file} holds {key!r}; a key is 32 hexadecimal digits")
    return keys


def _closure(roots: Iterable[str], inputs: Mapping[str, Iterable[str]]) -> set[str]:
    """Keys and, transitively, those of their inputs."""
    reached: set[str] = set()
    todo = list(roots)
    while todo:
        key = todo.pop()
        if key not in reached:
            reached.add(key)
            todo.extend(inputs.get(key, ()))
    return reached


def _age(record: Mapping[str, Any]) -> float:
    """Days since the build."""
    passed = datetime.now(UTC) - datetime.fromisoformat(record["created"])
    return passed / timedelta(days=1)


def _line(path: Path, record: Mapping[str, Any] | None) -> str:
    if record is None:
        state = "leftover" if path.name.startswith(".") else "damaged"
        return f"{path.parent.name:<16} {path.name:<32} {state:>10}"
    size = sum(entry["bytes"] for entry in record["files"].values()) / 1e6
    age = timedelta(seconds=round(86400 * _age(record)))
    row = f"{path.parent.name:<16} {path.name:<32} {size:>10.3f} {age!s:>18}"
    return f"{row} {record['seconds']:>9.2f}"
