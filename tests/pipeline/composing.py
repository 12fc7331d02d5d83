"""The shipped configuration files and Hydra's, parsed once for all that tests compose of them."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from unittest import mock

import hydra
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.run.composer import Composer
from tests.pipeline.conftest import CONF, GROUPS

SHIPPED = {CONF, Path(hydra.__file__).parent}
_load = OmegaConf.load


@functools.cache
def _parsed(file: str, changed: int) -> Any:
    return _load(file)


def _copied(file: IO[str] | str | Path) -> Any:
    name = str(getattr(file, "name", file))
    if SHIPPED.isdisjoint(Path(name).parents):
        return _load(file)
    return copy.deepcopy(_parsed(name, os.stat(name).st_mtime_ns))


@contextmanager
def parsed_once() -> Iterator[None]:
    """Each of these files is parsed once, which is most of what composing takes."""
    with mock.patch.object(OmegaConf, "load", _copied):
        yield


@contextmanager
def composing() -> Iterator[None]:
    """Hydra on the files of `conf/`."""
    with initialize_config_dir(str(CONF), version_base="1.3"), parsed_once():
        yield


COMPOSER = Composer(functools.partial(compose, "config"), GROUPS)
