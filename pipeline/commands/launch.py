"""One conversion, or a Hydra multirun, and the table of what came out."""

from __future__ import annotations

import logging
import os
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pipeline.results import folders
from pipeline.results.folders import RunFolder
from pipeline.run import axes, failures, options, sweeper
from pipeline.run.errors import REFUSED, one_line
from pipeline.run.overrides import launched, settled, shown
from pipeline.run.shipped import CONF
from stages.errors import InputError

if TYPE_CHECKING:
    from pipeline.run.settings import Settings

log = logging.getLogger("pipeline")
RUN_ID = "PIPELINE_RUN_ID"
RUNS = Path("outputs/runs")
TABLES = Path("outputs/tables")
SUFFIXES = ("md", "csv", "tex")  # of every table


def main(arguments: Sequence[str]) -> int:
    """Runs Hydra, then prints the table of the jobs that finished and lists those that failed.

    `arguments` are Hydra's flags and overrides.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for people
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # its errors come here, to be one line
    os.environ.setdefault(RUN_ID, f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}")
    folders.forget()
    sweeper.register()
    try:
        sys.argv[1:] = launched(settled(arguments))  # where Hydra reads them
        stopped = _launch()
        return _finish(_folder(), stopped)
    except (*REFUSED, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what the store holds", file=sys.stderr)
        _ended(_folder(), "KILLED")
        return 130


def _folder() -> RunFolder:
    """Where Hydra has put the run: a sweep's folder, or that of the one job or of its id."""
    default = RUNS / os.environ[RUN_ID]
    folder = folders.started() or default
    return RunFolder(default if folder == default / "0" else folder)


def _launch() -> list[dict[str, Any]]:
    """Runs Hydra; what ended its launcher early is one more failure beside those of the jobs."""
    try:
        with failures.interruptible():
            _job()
    except REFUSED:
        raise
    except Exception as error:
        return [failures.stopped(error)]
    return []


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def _job(cfg: DictConfig) -> None:
    """One job. An error of the user is a line in failed.json and the log, never a lost sweep."""
    folder = folders.enter()
    from pipeline.run.devices import placed
    from pipeline.tables import tables
    from pipeline.tracking import tracked

    try:
        settings = options.settings(cfg)
        read = settings.evaluation
        tables.check_columns(
            settings.table.columns, read.corpora, read.tasks, [*settings.energy.profiles]
        )
        settings.check_places()
        _check_workers(settings)
        alone = settings.runtime.workers == 1  # workers take a device each, and this process none
        with placed(settings) if alone else nullcontext(settings) as settings:
            _run(settings, folder)
    except Exception as error:
        line = failures.reason(error)
        failures.record(line, HydraConfig.get().mode == RunMode.MULTIRUN)
        folder.fail(_overrides(), line)
        failures.release(error)
        tracked.log_job(folder, lambda job: ())


def _check_workers(settings: Settings) -> None:
    """Raises InputError for several workers of each of several jobs at once."""
    launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
    if settings.runtime.workers > 1 and launcher not in ("basic", None):
        raise InputError(
            f"runtime.workers={settings.runtime.workers} and hydra/launcher={launcher}: jobs at once "
            "would each have as many workers; give one of the two"
        )


def _run(settings: Settings, folder: RunFolder) -> None:
    from pipeline.commands import sweep
    from pipeline.run import jobs, neurobench, runner
    from pipeline.run.measured import energy_tables
    from pipeline.tracking import tracked

    started = time.time()
    if settings.runtime.plan:  # nothing asked for a plan, but what is configured may not run either
        raise InputError("runtime.plan is on in a file; give runtime.plan=true on the command line")
    log.info("%s on %s", settings.name, settings.model.name)
    result, sites, run = runner.execute(settings, jobs.command(_overrides()))
    result["run"] = _provenance(folder.path) | {"device": run.device}
    result["run"] |= {name: run.store.runtime[name] for name in ("workers", "engine")}
    result["run"] |= {"started": started, "ended": time.time()}
    folder.leave(result, sites, energy_tables(run.measured), neurobench.read(run.measured))
    tracked.log_job(folder, sweep.job_figures)


def _provenance(folder: Path) -> dict[str, Any]:
    from pipeline.store import provenance

    return {
        "id": os.environ[RUN_ID],
        "folder": str(folder),
        "overrides": _overrides(),
        "git": provenance.git_state(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
    }


def _overrides() -> list[str]:
    """The job's overrides as a person types them: an interpolation in one has no value in Hydra's node."""
    hydra = HydraConfig.get()
    every: list[str] = OmegaConf.to_container(hydra.overrides.task)  # type: ignore[assignment]
    return axes.typed(every, axes.of_sweeper(hydra, "rows"))


def _finish(folder: RunFolder, stopped: list[dict[str, Any]]) -> int:
    """Prints and writes the sweep's table and figures, ends its parent run, lists the failed jobs."""
    from pipeline.commands import sweep
    from pipeline.results import naming
    from pipeline.tables import tables

    failed = [*folder.failures, *stopped]
    finished = folder.finished
    if finished:
        print()
        name = naming.run_name(folder)
        tables.sweep_table(folder, name, TABLES)
        print(f"\nresults: {folder.pattern(finished)}")
        print(f"table: {TABLES / name}.md, .csv, .tex")
        print(f"explore: python -m pipeline report {folder.path}")
        files = sorted(TABLES / f"{name}{part}.{s}" for part in ("", "_energy") for s in SUFFIXES)
        try:
            if written := sweep.draw(folder, name, TABLES):
                kinds = dict.fromkeys(path.stem.removeprefix(f"{name}_") for path in written)
                print(f"and: {TABLES / name}_{{{','.join(kinds)}}}")
                files += written
        except Exception as error:  # the table stands; what a figure lacks is a failed job
            log.exception("figures")
            failed.append({"overrides": ["figures"], "error": f"{type(error).__name__}: {error}"})
        _ended(folder, "FAILED" if failed else "FINISHED", files)
    elif failed:
        _ended(folder, "FAILED")
    for failure in failed:
        print(
            f"failed: {' '.join(shown(failure['overrides']))}: {failure['error']}", file=sys.stderr
        )
    return 1 if failed else 0


def _ended(folder: RunFolder, status: str, files: Sequence[Path] = ()) -> None:
    """Ends a sweep's parent run, with its tables and figures; an interrupted one's wait for the rest."""
    from pipeline.tracking import tracked

    if folder.swept:
        folder.end(status)
        tracked.log_sweep(folder, lambda sweep: files)
