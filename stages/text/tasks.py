"""lm-eval's tasks: the file that describes one, the data set that it reads, the commit of that."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from stages.errors import InputError, nearest
from stages.model.hub import commit
from stages.text.hub import ADDRESS, builder

_NAME = re.compile(rb"^(?:task|group):[ \t]*[\"']?([^\"'\s#]+)", re.MULTILINE)
_FORMATS = ("json", "csv", "parquet", "arrow", "text")  # of files, in place of a data set
_IGNORED = "trust_remote_code"  # an option that datasets no longer has


def yaml_of(task: str) -> str:
    """Return the file that describes a task; InputError where lm-eval has no such task."""
    return str(_task(task).yaml_path)


def pinned(name: str, task: str) -> dict[str, Any]:
    """Return the data set that lm-eval's `task` reads from the hub, as fields of its configuration.

    Its revision is the commit that stands there now, or the last one seen where the hub does not answer.
    `name` is what the user calls the task. Raises InputError where the hub refuses, or the task reads
    what no commit pins: files by their address, or what a function returns.
    """
    config = _task(task).cfg
    path, options = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if "custom_dataset" in config or not path or path in _FORMATS:
        raise InputError(
            f"tasks.{name}: lm-eval's {task} reads no data set with commits on the hub, so that which "
            f"questions it asks cannot be kept; give tasks.{name}.path=FILE"
        )
    sha = commit("dataset", path, options.get("revision"))
    return {
        "dataset_path": f"{ADDRESS}{path}",
        "dataset_name": config.get("dataset_name"),
        "dataset_kwargs": {**options, "revision": sha},
    }


def check_commit(data: dict[str, Any]) -> None:
    """Raise ConnectionError where `datasets` would read another commit than that of `pinned`'s fields."""
    options = {key: value for key, value in data["dataset_kwargs"].items() if key != _IGNORED}
    builder(data["dataset_path"], data["dataset_name"], **options)


@cache
def _index() -> dict[str, Any]:
    """lm-eval's tasks, groups and tags by name; it parses thousands of files to find them."""
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


@cache
def _named() -> dict[str, list[Path]]:
    """lm-eval's files by the task or group that a line of theirs names."""
    from lm_eval import tasks

    files: dict[str, list[Path]] = {}
    for path in Path(str(tasks.__file__)).parent.glob("**/*.yaml"):
        for name in _NAME.findall(path.read_bytes()):
            files.setdefault(name.decode(), []).append(path)
    return files


def _entry(task: str) -> Any:
    """lm-eval's entry of a task, from its folder alone where one file only names it; None: no such."""
    from lm_eval.tasks import TaskManager

    files = _named().get(task, [])
    if len(files) == 1:
        index = TaskManager(include_path=files[0].parent, include_defaults=False).task_index
        entry = index.get(task)
        if entry is not None and entry.kind.name == "TASK" and entry.yaml_path == files[0]:
            return entry
    return _index().get(task)


def _task(task: str) -> Any:
    entry = _entry(task)
    if entry is None or entry.yaml_path is None:
        hint = nearest(task, _index()) or "`lm-eval ls tasks` lists them"
        raise InputError(f"lm-eval has no task {task!r}; {hint}")
    if entry.kind.name != "TASK":
        raise InputError(
            f"lm-eval's {task} is a {entry.kind.name.lower()} of tasks; give one of them"
        )
    return entry
