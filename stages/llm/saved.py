"""Spiking models in folders: what a checkpoint holds of a conversion, and how it is bound again."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.codings.coding import Fit
from stages.errors import InputError
from stages.fitting import FittedNeurons
from stages.llm.counters import Counters
from stages.llm.prefix import attach_prefix
from stages.llm.quantizer import METHOD, SpikingConfig, SpikingQuantizer
from stages.llm.sites import find_sites
from stages.llm.transforms import Transform
from stages.patching import Conversion, patched

NEURONS = "spiking_neurons"
_BOUND = "spiking_attachment"
_PACKAGES = ("torch", "transformers", "spiking-llm-pipeline")


class Neurons(nn.Module):
    """The parameters of all neurons, sites first, as buffers that stay float32 in every cast."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_buffer(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Neurons:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, value in self.named_buffers():
            if value.dtype != torch.float32:  # a cast; only its move to a device is meant for them
                kept = before[name] if before[name].device.type != "meta" else value.float()
                setattr(self, name, kept.to(value.device))
        return self


@dataclass
class Attachment:
    """What keeps the ports of a loaded model on; `close` takes them off."""

    conversion: Conversion
    stack: ExitStack

    def close(self) -> None:
        self.stack.close()


def save(
    model: PreTrainedModel,
    conversion: Conversion,
    transform: Transform,
    prefix: tuple[int, ...],
    folder: Path,
) -> None:
    """Writes a model with the neurons of `conversion` as `from_pretrained` reads it.

    `model` is the dense one after its transform; it is left as it was.
    """
    neurons = conversion.neurons
    spec = SpikingConfig(
        coding=encoded(conversion.coding),
        sites=list(neurons.sites),
        parameters={name: list(value.shape) for name, value in neurons.fit.params.items()},
        transform=encoded(transform),
        prefix=list(prefix),
        versions={name: version(name) for name in _PACKAGES},
    )
    with _marked(model, spec, Neurons(neurons.fit.params)):
        model.save_pretrained(folder)


@contextmanager
def _marked(model: Any, spec: SpikingConfig, neurons: Neurons) -> Iterator[None]:
    """The model with its neurons, as transformers saves one that a quantizer made."""
    model.add_module(NEURONS, neurons)
    model.config.quantization_config = spec
    model.hf_quantizer = SpikingQuantizer(spec)
    try:
        yield
    finally:
        delattr(model, NEURONS)
        del model.config.quantization_config
        model.hf_quantizer = None


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The spiking model of a folder; see `stages.load`."""
    path = Path(folder).expanduser()
    check(path)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be loaded: {line}; export the model again") from error
    if attachment(model) is None:
        raise InputError(f"{path} came back dense; import stages before transformers loads it")
    return model.eval()


def check(folder: Path) -> SpikingConfig:
    """The config of an exported model; raises InputError where the folder is none, or lacks neurons."""
    spec = saved_config(folder)
    if spec is None:
        raise InputError(
            f"{folder} holds no spiking model (no quantization_config of method {METHOD!r} in a "
            "config.json); write one by export.enabled=true"
        )
    found = _stored(folder)
    absent = [n for n in spec.parameters if f"{NEURONS}.{n}" not in found]
    if absent:
        raise InputError(
            f"{folder} lacks the neurons' parameters {', '.join(absent)}; export the model again"
        )
    return spec


def saved_config(folder: Path) -> SpikingConfig | None:
    """What the config.json of a folder says of neurons; None for a dense model."""
    file = folder / "config.json"
    found = json.loads(file.read_text()).get("quantization_config") if file.is_file() else None
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        return None
    return SpikingConfig(**{k: v for k, v in found.items() if k != "quant_method"})


def _stored(folder: Path) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    return names


def make_room(model: PreTrainedModel, spec: SpikingConfig) -> None:
    """Empty buffers for the neurons' parameters, which the checkpoint fills."""
    shapes = spec.parameters.items()
    empty = {n: torch.empty(shape, dtype=torch.float32, device="meta") for n, shape in shapes}
    model.add_module(NEURONS, Neurons(empty))


def attach(model: PreTrainedModel, spec: SpikingConfig) -> None:
    """Binds the neurons that a checkpoint has filled, for good, behind the transform it was saved with."""
    neurons: Any = getattr(model, NEURONS)
    params = dict(neurons.named_buffers())
    transform, coding = decoded(spec.transform), decoded(spec.coding)
    transform.restore(model)
    if spec.prefix:
        attach_prefix(model, spec.prefix)
    roles = {site.name: site for site in find_sites(model)}
    missing = [name for name in spec.sites if name not in roles]
    if missing:
        raise InputError(f"a spiking model with neurons at {missing[:3]}, which this model lacks")
    own = [roles[name] for name in spec.sites]
    unknown = torch.full((len(own),), torch.nan, dtype=torch.float64)
    fitted = FittedNeurons(
        tuple(spec.sites),
        tuple(site.role for site in own),
        tuple(site.layer for site in own),
        Fit(params),
        unknown,
        unknown,
    )
    bind(model, Conversion(coding, fitted))


def bind(model: PreTrainedModel, conversion: Conversion, counters: Counters | None = None) -> None:
    """Keeps a model patched beyond any block of code."""
    stack = ExitStack()
    stack.enter_context(patched(model, conversion, counters))
    model.__dict__[_BOUND] = Attachment(conversion, stack)


def attachment(model: PreTrainedModel) -> Attachment | None:
    """What binds the neurons of a loaded spiking model; None of a dense one."""
    found: Attachment | None = model.__dict__.get(_BOUND)
    return found


def encoded(value: Any) -> Any:
    """A dataclass of this package as plain values, the name of its class with its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"class": name} | {f.name: encoded(getattr(value, f.name)) for f in fields(value)}
    return [encoded(each) for each in value] if isinstance(value, list | tuple) else value


def decoded(value: Any) -> Any:
    """The inverse; InputError for the name of anything but a dataclass of this package."""
    if isinstance(value, list):
        return tuple(decoded(each) for each in value)
    if not isinstance(value, dict):
        return value
    module, _, name = str(value.get("class")).rpartition(".")
    kind: Any = None
    if module.partition(".")[0] == __name__.partition(".")[0]:
        try:
            kind = getattr(importlib.import_module(module), name, None)
        except ImportError:
            kind = None
    if not is_dataclass(kind):
        raise InputError(
            f"a config names the class {value.get('class')!r}, which is none of this version's codings "
            "or transforms; load it with the version that wrote it"
        )
    made: Any = kind
    return made(**{key: decoded(each) for key, each in value.items() if key != "class"})
