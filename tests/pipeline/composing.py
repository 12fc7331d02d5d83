"""The shipped configuration files, parsed once for all that tests compose of them."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from unittest import mock

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.run.composer import Composer
from tests.pipeline.conftest import CONF, GROUPS

_load = OmegaConf.load


@functools.cache
def _parsed(file: str, changed: int) -> Any:
    return _load(file)


def _copied(file: IO[str]) -> Any:
    return copy.deepcopy(_parsed(file.name, os.stat(file.name).st_mtime_ns))


@contextmanager
def composing() -> Iterator[None]:
    """Hydra as `conf/` initialises it; most of what it does is to parse the files."""
    with (
        initialize_config_dir(str(CONF), version_base="1.3"),
        mock.patch.object(OmegaConf, "load", _copied),
    ):
        yield


COMPOSER = Composer(functools.partial(compose, "config"), GROUPS)
