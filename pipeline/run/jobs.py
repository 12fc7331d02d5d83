"""The jobs that a command line stands for: the axes of its experiment, expanded and composed."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from pipeline.run.options import settings
from pipeline.run.overrides import settled
from pipeline.run.settings import Settings
from pipeline.run.shipped import CONF
from stages.errors import InputError


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its overrides, as Hydra would give them to it, and its configuration."""

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
    given = OverridesParser.create().parse_overrides(settled(overrides, conf=conf))
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        fixed = [o.input_line for o in given if not o.is_sweep_override() and o.input_line]
        whole = compose("config", fixed, return_hydra_config=True)
        params = whole.hydra.sweeper.params or {}
        axes = [f"{name}={value}" for name, value in params.items()]
        own = [
            o.input_line
            for o in given
            if not str(o.key_or_group).startswith("hydra") and o.input_line
        ]
        every = OverridesParser.create().parse_overrides([*axes, *own])
        values = {o.get_key_element(): _values(o) for o in every}  # the last of a key wins
        batch = itertools.product(*values.values())
        return [Job(job, compose("config", list(job))) for job in batch]


def _values(override: Override) -> list[str]:
    """What an override gives to each job in turn; the last override varies fastest, as in Hydra."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise InputError(f"{override.input_line}: give the values, as {key}=1,2,3 or a range(1,4)")
    return [f"{key}={value}" for value in override.sweep_string_iterator()]
