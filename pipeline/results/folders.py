"""A run's folder, wherever Hydra was asked to put it (hydra.run.dir, hydra.sweep.dir and subdir).

A sweep's folder keeps a list of its jobs' folders, each written by its job: a folder that was used
before, or subfolders of any depth, mix in no other job.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from pipeline.run.measured import KINDS, PARTS
from pipeline.store import processes, whole
from pipeline.store.spec import StoreSpec

if TYPE_CHECKING:
    import pandas as pd

JOBS = ".jobs"  # a file for each job of a sweep, called by its number: its folder
RESULT, FAILED = "result.json", "failed.json"
SITES, NEUROBENCH = "per_site.parquet", "neurobench.json"
MULTIRUN = "multirun.yaml"  # which Hydra leaves in the folder of a sweep
PROCESS = "process.json"  # of a sweep: which process started it, and when
ENDED = "ended.json"
KILLED = "ended without a result: killed, or still running where a launcher lost sight of it"
_started: list[Path] = []


@dataclass(frozen=True)
class RunFolder:
    """The folder of a job, or that of a sweep, whose jobs have folders below it.

    All files that a run leaves are read and written here. What is read is read once.
    """

    path: Path

    def leave(
        self,
        result: Mapping[str, Any],
        sites: pd.DataFrame,
        energy: Mapping[str, pd.DataFrame],
        neurobench: Mapping[str, Any],
    ) -> None:
        """Write what a job has measured: its result, its per-site table, its tables of energy,
        NeuroBench's metrics."""
        sites.to_parquet(self.path / SITES)
        for name, table in energy.items():
            table.to_csv(self.path / name, index=False)
        self.write(NEUROBENCH, neurobench)
        # last: a folder with a result is one that is whole
        (self.path / RESULT).write_text(json.dumps(result, indent=1, allow_nan=True))

    def fail(self, overrides: Sequence[str], line: str) -> None:
        """Write why a job has no result."""
        self.write(FAILED, {"overrides": list(overrides), "error": line})

    def end(self, status: str) -> None:
        """Write that a sweep has ended: FINISHED, FAILED or KILLED."""
        self.write(ENDED, {"status": status, "ended": time.time()})

    def read(self, name: str) -> dict[str, Any]:
        """A json file of the folder; empty where there is none."""
        file = self.path / name
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a json file of the folder, whole or not at all."""
        whole.write(self.path / name, json.dumps(values, indent=1))

    @cached_property
    def result(self) -> dict[str, Any]:
        """Every number of a job, empty where it has left no result."""
        return self.read(RESULT)

    @cached_property
    def failure(self) -> dict[str, Any]:
        """The overrides of a failed job and why it failed."""
        return self.read(FAILED)

    @cached_property
    def sites(self) -> pd.DataFrame:
        """The per-site table of a job."""
        import pandas as pd

        return pd.read_parquet(self.path / SITES)

    @cached_property
    def parts(self) -> pd.DataFrame:
        """Joules of a job by model, convention, phase, profile, operation and part."""
        import pandas as pd

        return pd.read_csv(self.path / PARTS)

    @cached_property
    def config(self) -> DictConfig:
        """The configuration of a job, which nothing changes any more."""
        return _written(self.path / ".hydra/config.yaml")

    @property
    def choices(self) -> Mapping[str, Any]:
        """The file that each group of a job's configuration is of."""
        return dict(_written(self.path / ".hydra/hydra.yaml").hydra.runtime.choices)

    def artifact(self, stage: str) -> Path:
        """The folder in the store of an artifact that a job has used or made."""
        key = self.result["keys"][stage]
        return StoreSpec.of(self.config.store).open().folder(stage.partition(" ")[0], key)

    @property
    def outcome(self) -> Path:
        """The file that says how a job ended; the later one, where it was run in its folder again."""
        files = [self.path / name for name in (RESULT, FAILED) if (self.path / name).exists()]
        return max(files, key=lambda path: path.stat().st_mtime)

    @property
    def swept(self) -> bool:
        """Whether this is the folder of a sweep."""
        return (self.path / MULTIRUN).exists()

    @cached_property
    def _multirun(self) -> Any:
        return _written(self.path / MULTIRUN).hydra

    @property
    def experiment(self) -> str | None:
        """The experiment that was chosen for a sweep; None without, and for a single run."""
        name = self._multirun.runtime.choices.experiment if self.swept else None
        return None if name in (None, "none") else str(name)

    @property
    def overrides(self) -> list[str]:
        """The overrides that were given to a sweep as a whole, or to a job."""
        if self.swept:
            return list(map(str, self._multirun.overrides.task))
        (job,) = self.jobs  # which a single run has in its folder or below it
        return list(map(str, OmegaConf.load(job.path / ".hydra/overrides.yaml")))

    @property
    def jobs(self) -> list[RunFolder]:
        """The jobs of a run in the order of their numbers; of a single run itself."""
        if (self.path / JOBS).is_dir():
            listed = sorted((self.path / JOBS).iterdir(), key=lambda file: int(file.name))
            places = [self.path / file.read_text(encoding="utf-8") for file in listed]
            return [RunFolder(Path(os.path.normpath(place))) for place in places]
        if (self.path / ".hydra").is_dir():
            return [self]
        names = (".hydra", RESULT)
        places = list({path.parent for name in names for path in self.path.glob(f"*/{name}")})
        return [RunFolder(place) for place in sorted(places, key=_number)]

    @property
    def finished(self) -> list[RunFolder]:
        """The jobs that have left a result."""
        return [job for job in self.jobs if (job.path / RESULT).exists()]

    @property
    def ended(self) -> list[RunFolder]:
        """The jobs that have left a result or the reason why there is none."""
        return [job for job in self.jobs if any((job.path / n).exists() for n in (RESULT, FAILED))]

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Overrides and error of every job that did not finish."""
        return [
            job.failure or {"overrides": job.overrides, "error": KILLED}
            for job in self.jobs
            if job.failure or not (job.path / RESULT).exists()
        ]

    @property
    def sweep(self) -> RunFolder | None:
        """The sweep that a job is of; None of a job by itself."""
        for folder in map(RunFolder, self.path.parents):
            if (folder.path / JOBS).is_dir() and self in folder.jobs:
                return folder
        above = RunFolder(self.path.parent)
        return above if above.swept and not (above.path / JOBS).is_dir() else None

    def pattern(self, jobs: Sequence[RunFolder]) -> str:
        """Where the results of these jobs lie, for people."""
        if jobs == [self]:
            return f"{self.path}/{RESULT}"
        depth = "*" if all(job.path.parent == self.path for job in jobs) else "**"
        return f"{self.path}/{depth}/{RESULT}"


class Started(Callback):
    """Remembers the folder of the run that Hydra starts in this process."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _start(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        _start(folder)
        (folder / JOBS).mkdir(parents=True)
        RunFolder(folder).write(PROCESS, {"process": processes.this(), "started": time.time()})


def _start(folder: Path) -> None:
    """Remember a folder, in which no earlier sweep is left."""
    shutil.rmtree(folder / JOBS, ignore_errors=True)
    for name in (MULTIRUN, ENDED):
        (folder / name).unlink(missing_ok=True)
    _started[:] = [folder]


def started() -> Path | None:
    """The folder of the run that was started last in this process; None before there is one."""
    return _started[0] if _started else None


def forget() -> None:
    """Forget the run before this one."""
    _started.clear()


def enter() -> RunFolder:
    """The folder of the job that Hydra runs now, listed in its sweep, without files of an earlier job."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    for name in (RESULT, FAILED, SITES, KINDS, PARTS, NEUROBENCH):
        (folder / name).unlink(missing_ok=True)
    if str(hydra.mode).endswith("MULTIRUN"):
        sweep = Path(hydra.sweep.dir)
        (sweep / JOBS).mkdir(parents=True, exist_ok=True)
        place = os.path.relpath(folder, sweep.absolute())
        (sweep / JOBS / str(hydra.job.num)).write_text(place, encoding="utf-8")
    return RunFolder(folder)


def _written(file: Path) -> DictConfig:
    """A file of Hydra's, read once: tables, figures and tracking each ask for those of every job."""
    return _loaded(file.absolute(), file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _loaded(file: Path, written: int) -> DictConfig:
    """A file as it was written then."""
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig)
    OmegaConf.set_readonly(config, True)
    return config


def _number(job: Path) -> tuple[float, str]:
    number = re.match(r"\d+", job.name)
    return (int(number[0]) if number else float("inf"), job.name)
