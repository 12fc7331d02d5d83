"""The sweeper of the pipeline: a Hydra plug-in that knows the rows of an experiment."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from pipeline.run.axes import plain, swept
from pipeline.run.composer import SweepLoader

log = logging.getLogger(__name__)
NAME = "hydra_plugins.spiking_llm_rows.RowSweeper"  # Hydra takes plug-ins of this namespace only


def register() -> None:
    """Lets Hydra find the sweeper under the name that conf/hydra/sweeper/rows.yaml has for it."""
    Plugins.instance().class_name_to_class[NAME] = RowSweeper


class RowSweeper(Sweeper):
    """Launches the rows of an experiment at every value of its axes, as plain jobs of Hydra."""

    config: DictConfig
    launcher: Launcher

    def __init__(self, rows: Mapping[str, Any] | None, params: Mapping[str, Any] | None) -> None:
        self.rows, self.params = rows or {}, params or {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        loader: Any = SweepLoader(hydra_context.config_loader, config)
        self.config = config
        self.hydra_context = HydraContext(loader, hydra_context.callbacks)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs; what they return. Errors of a configuration come before the first one starts."""
        hydra = self.config.hydra
        sweep = swept(arguments, self.params, self.rows, hydra.runtime.choices.coding)
        jobs = [job.all for job in sweep.jobs]
        folder = Path(hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        written = copy.deepcopy(self.config)
        written.hydra.overrides.task = plain(arguments)
        OmegaConf.save(written, folder / "multirun.yaml")
        self.validate_batch_is_legal(jobs)
        for note in sweep.notes:
            log.info("%s", note)
        returned = self.launcher.launch(jobs, initial_job_idx=0)
        for job in returned:
            _ = job.return_value  # raises what the job has raised
        return [returned]
