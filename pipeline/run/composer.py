"""The configurations of a sweep's jobs, for each of which Hydra would read and merge all files again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


@dataclass
class Composer:
    """Composes once what several jobs choose among files, and sets the values in which they differ.

    Hydra sets values behind the merged files, in the order of their overrides, as is done here.
    """

    compose: Callable[[list[str]], DictConfig]
    groups: Collection[str]  # keys whose values are names of files
    merged: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """The configuration of `overrides`; raises what Hydra raises for them."""
        every = _parsed(overrides)
        values = [each for each in every if self._sets_value(each)]
        if any(each.is_delete() for each in every):
            values = []  # a key that is set and then deleted
        chosen = tuple(str(each.input_line) for each in every if each not in values)
        if chosen not in self.merged:
            self.merged[chosen] = self.compose([*chosen])
        config = copy.deepcopy(self.merged[chosen])
        try:
            for each in values:
                OmegaConf.update(config, each.key_or_group, each.value(), merge=True)
        except OmegaConfBaseException:
            return self.compose([*overrides])  # whose error names the override
        return config

    def _sets_value(self, override: Override) -> bool:
        plain = override.type is OverrideType.CHANGE and override.package is None
        return (
            plain and not override.is_hydra_override() and override.key_or_group not in self.groups
        )


@dataclass
class FilesOnce:
    """The files of a configuration, each parsed once for all compositions; Hydra parses all for each.

    A composition changes what it is given, and gets a copy.
    """

    repository: Any  # Hydra's, whose class is not public
    parsed: dict[str, ConfigResult | None] = field(default_factory=dict)

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self.parsed:
            self.parsed[config_path] = self.repository.load_config(config_path)
        return copy.deepcopy(self.parsed[config_path])

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        """Forgets the files: others may come before them now."""
        self.repository.initialize_sources(config_search_path)
        self.parsed.clear()

    def __deepcopy__(self, memo: Any) -> FilesOnce:
        return self  # for each composition Hydra copies its repository

    def __getattr__(self, name: str) -> Any:
        return getattr(self.repository, name)

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        return type(self), (self.repository,)


def reading_once(loader: ConfigLoader) -> ConfigLoader:
    """The same loader of Hydra, which parses each file once."""
    once: Any = copy.copy(loader)
    once.repository = FilesOnce(once.repository)
    return once


class SweepLoader:
    """The loader of Hydra's configurations that a launcher is given, with a composer for its jobs."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self.loader, self.master = reading_once(loader), master
        self.composer = Composer(self._load, [*master.hydra.runtime.choices])

    def load_sweep_config(
        self, master_config: DictConfig, sweep_overrides: Sequence[str]
    ) -> DictConfig:
        """As `ConfigLoader.load_sweep_config` has it, the overrides in Hydra's node included."""
        config = self.composer(sweep_overrides)
        task = [each for each in _parsed(sweep_overrides) if not each.is_hydra_override()]
        job = config.hydra.job
        form = job.config.override_dirname
        named = sorted(
            str(each.input_line) for each in task if each.key_or_group not in form.exclude_keys
        )
        job.override_dirname = form.item_sep.join(named).replace("=", form.kv_sep)
        config.hydra.overrides.task = [each.input_line for each in task]
        return config

    def _load(self, overrides: list[str]) -> DictConfig:
        return self.loader.load_sweep_config(self.master, overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __reduce__(self) -> tuple[type, tuple[ConfigLoader, DictConfig]]:
        return type(self), (self.loader, self.master)  # without what is merged here: that is much


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """The overrides of one job as Hydra reads them."""
    return OverridesParser.create().parse_overrides([*overrides])
