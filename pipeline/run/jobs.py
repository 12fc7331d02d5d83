"""The jobs that a command line stands for, composed as Hydra would compose each of them."""

from __future__ import annotations

import functools
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from pipeline.run.axes import of_sweeper, swept
from pipeline.run.composer import Composer, reading_once
from pipeline.run.grammar import parsed
from pipeline.run.options import settings
from pipeline.run.overrides import settled
from pipeline.run.settings import Settings
from pipeline.run.shipped import CONF

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its overrides, as a person types them, and its configuration."""

    overrides: tuple[str, ...]
    config: DictConfig

    @property
    def settings(self) -> Settings:
        return settings(self.config)

    @property
    def command(self) -> str:
        """The command that runs this job alone."""
        return command(self.overrides)


def command(overrides: Sequence[str]) -> str:
    """The command that runs the job of these overrides alone, whatever sweep it is of."""
    return shlex.join(["python", "-m", "pipeline", *overrides, "hydra.mode=RUN"])


def jobs(overrides: Sequence[str], conf: Path = CONF) -> list[Job]:
    """The jobs in the order of the sweep. `overrides` win over the experiment's own axes.

    Raises what Hydra raises for what it cannot parse or compose, InputError as `settled` does.
    """
    given = parsed(settled(overrides, conf=conf))
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        known = GlobalHydra.instance()
        known.hydra.config_loader = reading_once(known.config_loader())  # type: ignore[union-attr]
        fixed = [o.input_line for o in given if not o.is_sweep_override() and o.input_line]
        hydra = compose("config", fixed, return_hydra_config=True).hydra
        lines = [str(o.input_line) for o in given if not str(o.key_or_group).startswith("hydra")]
        sweep = swept(
            lines,
            of_sweeper(hydra, "params"),
            of_sweeper(hydra, "rows"),
            hydra.runtime.choices.coding,
        )
        for note in sweep.notes:
            log.info("%s", note)
        composed = _composer(conf.resolve(), tuple(hydra.runtime.choices))
        return [Job(job.typed, composed(job.all)) for job in sweep.jobs]


@functools.lru_cache(maxsize=4)
def _composer(conf: Path, groups: tuple[str, ...]) -> Composer:
    """The tables of a page ask for jobs of the same files one after the other."""
    return Composer(functools.partial(compose, "config"), groups)
