"""The folder of a spiking model: what its config says of neurons, held against what its files hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from stages.checkpoint.quantizer import METHOD, SpikingConfig
from stages.codings.base import Coding
from stages.errors import InputError
from stages.registry import identity, lookup
from stages.transforms.transforms import Transform

NEURONS = "spiking_neurons"
AGAIN = "export the model again"


def is_spiking(folder: Path) -> bool:
    """Whether the config.json of a folder names neurons; raises InputError where it cannot be read."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({error}); {AGAIN}") from error
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def check(spec: SpikingConfig, files: Sequence[str]) -> None:
    """Raises InputError unless `files` hold just the neurons of a config, a row a site, in float32."""
    found = _headers(files)
    wanted = {name: ("F32", list(shape)) for name, shape in spec.parameters.items()}
    absent, surplus = sorted(wanted.keys() - found), sorted(found.keys() - wanted)
    if absent or surplus:
        told = f"lacks {', '.join(absent)}" if absent else f"also has {', '.join(surplus)}"
        raise InputError(f"a checkpoint {told} among the parameters of its neurons; {AGAIN}")
    for name, (kind, shape) in wanted.items():
        if found[name] != (kind, shape):
            told, own = "{} {}".format(*found[name]), f"{kind} {shape}"
            raise InputError(f"{NEURONS}.{name} is {told} and its config says {own}; {AGAIN}")
        if shape[:1] != [len(set(spec.sites))]:
            rows = f"{len(set(spec.sites))} different sites"
            raise InputError(f"{NEURONS}.{name} has the shape {shape} for {rows}; {AGAIN}")


def _headers(files: Sequence[str]) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor of neurons."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118, it is no mapping
                    if key.startswith(f"{NEURONS}."):
                        part = tensors.get_slice(key)
                        found[key.removeprefix(f"{NEURONS}.")] = part.get_dtype(), part.get_shape()
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} is damaged ({error}); {AGAIN}") from error
    return found


# --- dataclasses in a config -----------------------------------------------------------------------


def encoded(value: Any) -> Any:
    """A registered dataclass as plain values: its name and version with its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        name = identity(type(value))
        if name is None:
            raise TypeError(f"{type(value).__qualname__} has no registered name")
        return {"class": name} | {f.name: encoded(getattr(value, f.name)) for f in fields(value)}
    return [encoded(each) for each in value] if isinstance(value, list | tuple) else value


def decoded_coding(spec: SpikingConfig) -> Coding:
    """The coding of a config; InputError where it names none of this version's."""
    found = _decoded(spec.coding)
    if not isinstance(found, Coding) or not found.converts:
        raise InputError(f"a config gives as coding {spec.coding}, which is none; {AGAIN}")
    return found


def decoded_transform(spec: SpikingConfig) -> Transform:
    """The transform of a config; InputError where it names none of this version's."""
    found = _decoded(spec.transform)
    if not isinstance(found, Transform):
        raise InputError(f"a config gives as transform {spec.transform}, which is none; {AGAIN}")
    return found


def _decoded(value: Any) -> Any:
    """The inverse of `encoded`; InputError for a name that is not registered."""
    if isinstance(value, list):
        return tuple(_decoded(each) for each in value)
    if not isinstance(value, Mapping):
        return value
    kind: Any = lookup(str(value.get("class")))
    try:
        return kind(**{key: _decoded(each) for key, each in value.items() if key != "class"})
    except TypeError as error:  # an unknown field, or one that is missing
        raise InputError(
            f"a config gives {kind.__name__} what it does not take ({error}); load it with the "
            "version that wrote it"
        ) from error
