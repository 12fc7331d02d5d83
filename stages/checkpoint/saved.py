"""Spiking models in folders: what a checkpoint holds of a conversion, and how it is bound again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.checkpoint.format import (
    AGAIN,
    NEURONS,
    check,
    decoded_coding,
    decoded_transform,
    encoded,
    is_spiking,
)
from stages.checkpoint.quantizer import METHOD, SpikingConfig, SpikingQuantizer
from stages.errors import InputError
from stages.fitted import Conversion, Fit, FittedNeurons
from stages.model.files import unreported
from stages.model.loading import readable
from stages.model.sites import find_sites
from stages.patching import patched
from stages.ports.attachment import Attachment, attachment, record, refuse_spiking
from stages.transforms.prefix import attach_prefix
from stages.transforms.transforms import Fuse, Transform, Untouched

__all__ = ["Neurons", "attach", "attachment", "bind", "describe", "load", "make_room", "save"]
_SAVE = "save_pretrained"
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
    refuse_spiking(model)
    spec = describe(conversion, transform, prefix)
    with _marked(model, spec, Neurons(conversion.neurons.fit.params)):
        model.save_pretrained(folder)


def describe(
    conversion: Conversion, transform: Transform, prefix: tuple[int, ...] = ()
) -> SpikingConfig:
    """What a checkpoint's config says of a conversion."""
    neurons = conversion.neurons
    return SpikingConfig(
        coding=encoded(conversion.coding),
        sites=list(neurons.sites),
        parameters={name: list(value.shape) for name, value in neurons.fit.params.items()},
        transform=encoded(transform),
        prefix=list(prefix),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    """Those of what writes a checkpoint; a source tree that is not installed has none."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextmanager
def _marked(model: Any, spec: SpikingConfig, neurons: Neurons) -> Iterator[None]:
    """The model with its neurons, as transformers saves one that a quantizer made."""
    _mark(model, spec, neurons)
    try:
        yield
    finally:
        _unmark(model)


def _mark(model: Any, spec: SpikingConfig, neurons: Neurons) -> None:
    model.__dict__.pop(_SAVE, None)
    model.add_module(NEURONS, neurons)
    model.config.quantization_config = spec
    model.hf_quantizer = SpikingQuantizer(spec)
    model.is_quantized = True


def _unmark(model: Any) -> None:
    transform = decoded_transform(model.config.quantization_config)
    if not isinstance(transform, Untouched | Fuse):
        model.__dict__[_SAVE] = _refuse_saving
    delattr(model, NEURONS)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _refuse_saving(*arguments: Any, **options: Any) -> NoReturn:
    """Stands for the save_pretrained of a model that is rotated, or has a prefix, and no neurons."""
    raise InputError(
        "a part of this model's transform works while it runs, and a folder would hold its weights "
        "alone: stages.convert gives it neurons, with which it is saved whole"
    )


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The spiking model of a folder; see `stages.load`."""
    path = Path(folder).expanduser()
    if not is_spiking(path):
        raise InputError(
            f"{path} holds no spiking model (no quantization_config of method {METHOD!r} in a "
            "config.json); write one by export.enabled=true"
        )
    with readable(str(path), AGAIN), unreported():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    model, report = loaded
    faults = {
        "are not in its files": report["missing_keys"],  # transformers has filled them at random
        "have another shape": {name for name, _, _ in report["mismatched_keys"]},
        "have no place": report["unexpected_keys"],
    }
    for what, names in faults.items():
        if names:
            raise InputError(
                f"{path} does not fit its config.json: {len(names)} tensors {what}, the first is "
                f"{min(names)}; {AGAIN}"
            )
    if attachment(model) is None:
        raise InputError(f"{path} came back dense; import stages before transformers loads it")
    found: PreTrainedModel = model.eval()
    return found


def make_room(model: PreTrainedModel, spec: SpikingConfig, files: Sequence[str]) -> None:
    """Empty buffers for the neurons' parameters, which the checkpoint of `files` fills.

    Raises InputError where it does not hold what the config says.
    """
    check(spec, files)
    with torch.device("cpu"):  # transformers makes a model on the meta device
        decoded_coding(spec), decoded_transform(spec)  # refused before any weight is read
    shapes = spec.parameters.items()
    empty = {n: torch.empty(shape, dtype=torch.float32, device="meta") for n, shape in shapes}
    model.add_module(NEURONS, Neurons(empty))


def attach(model: PreTrainedModel, spec: SpikingConfig) -> None:
    """Binds the neurons that a checkpoint has filled, behind the transform it was saved with, until
    the model's attachment is closed."""
    coding, transform = decoded_coding(spec), decoded_transform(spec)
    spec.coding, spec.transform = encoded(coding), encoded(transform)  # as it is saved again
    transform.restore(model)
    if spec.prefix:
        attach_prefix(model, spec.prefix)
    roles = {site.name: site for site in find_sites(model)}
    missing = [name for name in spec.sites if name not in roles]
    if missing:
        raise InputError(f"a config has neurons at {missing[0]}, which its model lacks; {AGAIN}")
    own = [roles[name] for name in spec.sites]
    unknown = torch.full((len(own),), torch.nan, dtype=torch.float64)
    fitted = FittedNeurons(
        tuple(spec.sites),
        tuple(site.role for site in own),
        tuple(site.layer for site in own),
        Fit({}),
        unknown,
        unknown,
    )
    _attach(model, _held(model, Conversion(coding, fitted)))


def bind(model: PreTrainedModel, conversion: Conversion, spec: SpikingConfig) -> None:
    """Puts neurons on a dense model in memory until its attachment is closed; it is saved with them.

    Raises InputError for a spiking model, and where a site is not one of this model's.
    """
    refuse_spiking(model)
    _mark(model, spec, Neurons(conversion.neurons.fit.params))
    _attach(model, conversion)


def _attach(model: PreTrainedModel, conversion: Conversion) -> Attachment:
    """Lets the neurons of a marked model work; closing takes its mark off too."""
    with ExitStack() as stack:
        stack.callback(_unmark, model)
        stack.enter_context(patched(model, conversion))
        bound = Attachment(conversion, stack.pop_all())
    record(model, bound, partial(_copied, model))
    return bound


def _held(model: PreTrainedModel, conversion: Conversion) -> Conversion:
    """A conversion with the parameters that the model holds."""
    neurons: Any = getattr(model, NEURONS)
    fit = Fit(dict(neurons.named_buffers()), conversion.neurons.fit.curve)
    return replace(conversion, neurons=replace(conversion.neurons, fit=fit))


def _copied(model: Any, memo: dict[int, Any]) -> PreTrainedModel:
    """An independent spiking model, for copy.deepcopy.

    Hooks hold on to the modules and parameters they were made for, so both models get them again:
    what is copied is the dense model in between.
    """
    neurons, spec = getattr(model, NEURONS), model.config.quantization_config
    bound = attachment(model)
    assert bound is not None
    conversion = _held(model, bound.conversion)
    bound.close()
    try:
        dense = deepcopy(model, memo)
    finally:
        _mark(model, spec, neurons)
        bound.stack = _attach(model, conversion).stack  # a handle that somebody holds still closes
    _mark(dense, spec, deepcopy(neurons, memo))
    _attach(dense, _held(dense, conversion))
    return dense
