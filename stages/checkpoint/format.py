"""The folder of a spiking model: what its config says of neurons, held against what its files hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stages.checkpoint.config import SpikingConfig
from stages.codec import decode, encode
from stages.codings.base import Coding
from stages.errors import InputError
from stages.fitted import Conversion
from stages.model.quantised import SPIKING
from stages.transforms.transform import Transform

NEURONS = "spiking_neurons"
AGAIN = "export the model again"
_PACKAGES = ("torch", "transformers", "spiking-llm-pipeline")


def is_spiking(folder: Path) -> bool:
    """Return whether the config.json of a folder names neurons; InputError where it cannot be read."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    try:
        spec = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({error}); {AGAIN}") from error
    return isinstance(spec, dict) and spec.get("quant_method") == SPIKING


def check(spec: SpikingConfig, files: Sequence[str]) -> None:
    """Raise InputError unless `files` hold just the neurons of a config, a row a site, in float32."""
    stored = _headers(files)
    wanted = {name: ("F32", list(shape)) for name, shape in spec.parameters.items()}
    absent, surplus = sorted(wanted.keys() - stored), sorted(stored.keys() - wanted)
    if absent or surplus:
        fault = f"lacks {', '.join(absent)}" if absent else f"also has {', '.join(surplus)}"
        raise InputError(f"a checkpoint {fault} among the parameters of its neurons; {AGAIN}")
    for name, (kind, shape) in wanted.items():
        if stored[name] != (kind, shape):
            got, said = "{} {}".format(*stored[name]), f"{kind} {shape}"
            raise InputError(f"{NEURONS}.{name} is {got} and its config says {said}; {AGAIN}")
        if shape[:1] != [len(set(spec.sites))]:
            rows = f"{len(set(spec.sites))} different sites"
            raise InputError(f"{NEURONS}.{name} has the shape {shape} for {rows}; {AGAIN}")


def _headers(files: Sequence[str]) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor of neurons."""
    from safetensors import SafetensorError, safe_open

    headers = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118, it is no mapping
                    if key.startswith(f"{NEURONS}."):
                        part = tensors.get_slice(key)
                        headers[key.removeprefix(f"{NEURONS}.")] = (
                            part.get_dtype(),
                            part.get_shape(),
                        )
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} is damaged ({error}); {AGAIN}") from error
    return headers


def describe(
    conversion: Conversion, transform: Transform, prefix: tuple[int, ...] = ()
) -> SpikingConfig:
    """Describe a conversion as a checkpoint's config does."""
    neurons = conversion.neurons
    return SpikingConfig(
        coding=encode(conversion.coding),
        sites=list(neurons.sites),
        parameters={name: list(value.shape) for name, value in neurons.fit.params.items()},
        transform=encode(transform),
        prefix=list(prefix),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    """Those of what writes a checkpoint; a source tree that is not installed has none."""
    versions = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def decoded_coding(spec: SpikingConfig) -> Coding:
    """Return the coding of a config; InputError where it names none of this version's."""
    coding = decode(spec.coding)
    if not isinstance(coding, Coding) or not coding.converts:
        raise InputError(f"a config gives as coding {spec.coding}, which is none; {AGAIN}")
    return coding


def decoded_transform(spec: SpikingConfig) -> Transform:
    """Return the transform of a config; InputError where it names none of this version's."""
    transform = decode(spec.transform)
    if not isinstance(transform, Transform):
        raise InputError(f"a config gives as transform {spec.transform}, which is none; {AGAIN}")
    return transform
