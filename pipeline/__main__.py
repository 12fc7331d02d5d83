"""`python -m pipeline`: one conversion, or a Hydra multirun, and the table of what came out."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import one_line
from stages.errors import InputError

if TYPE_CHECKING:
    from pipeline.settings import Settings

log = logging.getLogger("pipeline")
CONF = Path(__file__).parents[1] / "conf"
RUN_ID = "PIPELINE_RUN_ID"
RUNS = Path("outputs/runs")
TABLES = Path("outputs/tables")


def main() -> int:
    """Runs Hydra, then prints the table of the jobs that finished and lists those that failed."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for people
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # its errors come here, to be told in one line
    os.environ.setdefault(RUN_ID, f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}")
    folder = RUNS / os.environ[RUN_ID]
    # Hydra has no null for a config group; the empty choice is called none.
    sys.argv[1:] = [re.sub(r"^(experiment|variant)=null$", r"\1=none", a) for a in sys.argv[1:]]
    try:
        _job()
    except (HydraException, OmegaConfBaseException, InputError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what the store holds", file=sys.stderr)
        return 130
    return _finish(folder)


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def _job(cfg: DictConfig) -> None:
    """One job. An error of the user is a line in failed.json and the log, never a lost sweep."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        settings: Settings = instantiate(cfg)
        _run(settings, cfg, folder)
    except (HydraException, OmegaConfBaseException, InputError) as error:
        _failed(folder, one_line(error))
    except Exception as error:
        log.exception("job failed")
        _failed(folder, f"{type(error).__name__}: {error}")


def _run(settings: Settings, cfg: DictConfig, folder: Path) -> None:
    from pipeline import pictures, results, runner

    log.info("%s", settings.name)
    result, sites, run = runner.execute(settings)
    result["run"] = _provenance(folder)
    (folder / "result.json").write_text(json.dumps(result, indent=1, allow_nan=True))
    sites.to_parquet(folder / "per_site.parquet")
    results.energy_by_kind(run).to_csv(folder / "energy_by_kind.csv", index=False)
    if settings.tracking.enabled:
        config = OmegaConf.to_yaml(cfg, resolve=True)
        pictures.track(settings, result, sites, run, config, _parent(settings, folder))


def _provenance(folder: Path) -> dict[str, Any]:
    from pipeline import provenance

    return {
        "id": os.environ[RUN_ID],
        "folder": str(folder),
        "overrides": _overrides(),
        "git": provenance.git_state(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
    }


def _parent(settings: Settings, folder: Path) -> str | None:
    """The sweep's parent run in MLflow, opened by whichever of its jobs comes first."""
    from pipeline import tracking

    if "MULTIRUN" not in str(HydraConfig.get().mode):
        return None
    record = folder.parent / "parent.json"
    with FileLock(record.with_suffix(".lock")):
        if not record.exists():
            name = _experiment(HydraConfig.get()) or "sweep"
            tags = {"sweep": os.environ[RUN_ID], "experiment": name}
            run_id = tracking.start_sweep(settings.tracking, f"{name} {os.environ[RUN_ID]}", tags)
            record.write_text(json.dumps({"run_id": run_id, "tracking": vars(settings.tracking)}))
    parent = json.loads(record.read_text())["run_id"]
    return None if parent is None else str(parent)


def _failed(folder: Path, line: str) -> None:
    log.error("%s", line)
    record = {"overrides": _overrides(), "error": line}
    (folder / "failed.json").write_text(json.dumps(record))


def _overrides() -> list[str]:
    """The job's overrides as they were given: an interpolation in one has no value in Hydra's node."""
    return list(OmegaConf.to_container(HydraConfig.get().overrides.task))  # type: ignore[arg-type]


def _finish(folder: Path) -> int:
    """Prints and writes the sweep's table and figures, ends its parent run, lists the failed jobs."""
    from pipeline import sweep, tables, tracking

    failures = [json.loads(p.read_text()) for p in sorted(folder.glob("*/failed.json"))]
    finished = sorted(folder.glob("*/result.json"))
    if finished:
        print()
        name = _table_name(folder)
        tables.sweep_table(folder, name, TABLES)
        print(f"\nresults: {folder}/*/result.json")
        print(f"table: {TABLES / name}.md, .csv, .tex")
        try:
            if written := sweep.draw(folder, name, TABLES):
                print(f"and: {', '.join(path.name for path in written)}")
        except Exception as error:  # the table stands; what a figure lacks is told as a failed job
            log.exception("figures")
            failures.append({"overrides": ["figures"], "error": f"{type(error).__name__}: {error}"})
    record = folder / "parent.json"
    if record.exists():
        parent = json.loads(record.read_text())
        spec = tracking.TrackingSpec(**parent["tracking"])
        tracking.end_sweep(spec, parent["run_id"], "FAILED" if failures else "FINISHED")
    for failure in failures:
        print(f"failed: {' '.join(failure['overrides'])}: {failure['error']}", file=sys.stderr)
    return 1 if failures else 0


def _table_name(folder: Path) -> str:
    """An experiment's table by its name; any other run's by its id."""
    choice = folder / "multirun.yaml"
    name = _experiment(OmegaConf.load(choice).hydra) if choice.exists() else None
    return name or folder.name


def _experiment(hydra_config: Any) -> str | None:
    """The experiment that was chosen, if one was."""
    name = hydra_config.runtime.choices.experiment
    return None if name in (None, "none") else str(name)


if __name__ == "__main__":
    sys.exit(main())
