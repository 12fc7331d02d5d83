"""Hardware profiles by name, as `conf/profile` has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from pipeline.run import options, shipped
from pipeline.run.errors import choose
from pipeline.run.shipped import CONF
from stages.energy import Energy
from stages.errors import InputError
from stages.profiles.base import Profile


def profile(name: str, conf: Path = CONF) -> Profile:
    """The hardware profile of a name; InputError where there is none, or where its file is amiss."""
    (node,) = _file(name, conf).values()
    options.check(OmegaConf.to_container(node, resolve=True), f"profile {name}")
    made: Profile = instantiate(node)
    return made


def energy(names: Sequence[str] | None = None, conf: Path = CONF) -> Energy:
    """The energy stage of conf/config.yaml, with these profiles instead of its own."""
    config = OmegaConf.load(conf / "energy" / f"{shipped.default('energy', conf)}.yaml")
    every = names or shipped.choices("profile", conf)
    profiles = OmegaConf.merge(*(_file(name, conf) for name in every))
    made: Energy = instantiate(OmegaConf.merge(config, {"profile": profiles}))
    return made


def _file(name: str, conf: Path) -> DictConfig:
    files = shipped.keyed("profile", conf)
    if name not in files:
        raise InputError(f"profile={name}: no such hardware profile; {choose(name, [*files])}")
    return OmegaConf.create(files[name])
