"""Where a run's jobs lie, wherever Hydra was told to put them (hydra.run.dir, hydra.sweep.dir and subdir).

A sweep's folder keeps a list of its jobs' folders, each written by its job: a folder that was used
before, or subfolders of any depth, mix in no other job.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

JOBS = ".jobs"  # a file for each job of a sweep, called by its number: its folder
SWEPT = ("multirun.yaml", "parent.json", "ended.json")  # what else a sweep leaves in its folder
RESULT = "result.json"
RECORD = "failed.json"
OUTCOMES = (RESULT, RECORD)
LEFT = (*OUTCOMES, "per_site.parquet", "energy_by_kind.csv")  # by a job in its folder
_started: list[Path] = []


class Started(Callback):
    """Remembers the folder of the run that Hydra starts in this process."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _start(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        _start(folder)
        (folder / JOBS).mkdir(parents=True)


def _start(folder: Path) -> None:
    """Remembers a folder, in which no earlier sweep is left."""
    shutil.rmtree(folder / JOBS, ignore_errors=True)
    for name in SWEPT:
        (folder / name).unlink(missing_ok=True)
    _started[:] = [folder]


def started() -> Path | None:
    """The folder of the run that was started last in this process; None before there is one."""
    return _started[0] if _started else None


def forget() -> None:
    """Lets go of the run before this one."""
    _started.clear()


def enter() -> Path:
    """The folder of the job that Hydra runs now, listed in its sweep and without what an earlier left."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    for name in LEFT:
        (folder / name).unlink(missing_ok=True)
    if str(hydra.mode).endswith("MULTIRUN"):
        sweep = Path(hydra.sweep.dir)
        (sweep / JOBS).mkdir(parents=True, exist_ok=True)
        place = os.path.relpath(folder, sweep.absolute())
        (sweep / JOBS / str(hydra.job.num)).write_text(place, encoding="utf-8")
    return folder


def jobs(folder: Path) -> list[Path]:
    """The folders of a run's jobs in the order of their numbers; of a single run its own."""
    if (folder / JOBS).is_dir():
        listed = sorted((folder / JOBS).iterdir(), key=lambda file: int(file.name))
        return [
            Path(os.path.normpath(folder / file.read_text(encoding="utf-8"))) for file in listed
        ]
    if (folder / ".hydra").is_dir():
        return [folder]
    found = {path.parent for name in (".hydra", RESULT) for path in folder.glob(f"*/{name}")}
    return sorted(found, key=_number)


def finished(folder: Path) -> list[Path]:
    """The folders of the jobs that have left a result."""
    return [job for job in jobs(folder) if (job / RESULT).exists()]


def ended(folder: Path) -> list[Path]:
    """The folders of the jobs that have left a result or the reason why there is none."""
    return [job for job in jobs(folder) if any((job / name).exists() for name in OUTCOMES)]


def sweep(job: Path) -> Path | None:
    """The folder of the sweep that a job is of; None of a job by itself."""
    for folder in job.parents:
        if (folder / JOBS).is_dir() and job in jobs(folder):
            return folder
    whole = (job.parent / "multirun.yaml").exists() and not (job.parent / JOBS).is_dir()
    return job.parent if whole else None


def pattern(folder: Path, found: Sequence[Path]) -> str:
    """Where the results of these jobs lie, for people."""
    if list(found) == [folder]:
        return f"{folder}/{RESULT}"
    depth = "*" if all(job.parent == folder for job in found) else "**"
    return f"{folder}/{depth}/{RESULT}"


def _number(job: Path) -> tuple[float, str]:
    number = re.match(r"\d+", job.name)
    return (int(number[0]) if number else float("inf"), job.name)
