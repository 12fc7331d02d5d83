"""How neurons are bound to a model until they are taken off, so that it is saved and copied with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from stages.checkpoint.config import SpikingConfig
from stages.checkpoint.format import AGAIN, NEURONS, check, decoded_coding, decoded_transform
from stages.checkpoint.state import state_hooks
from stages.codec import encode
from stages.codings.base import Fit
from stages.errors import InputError
from stages.fitted import Conversion, FittedNeurons
from stages.model.sites import find_sites
from stages.ports.attachment import Attachment, attachment, record, refuse_spiking
from stages.ports.patched import patched
from stages.transforms.prefix import attach_prefix
from stages.transforms.transform import Fuse, Untouched

_SAVE = "save_pretrained"
_CASTS = ("half", "float")


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

    @classmethod
    def copied(cls, parameters: Mapping[str, Tensor]) -> Neurons:
        """Hold copies: one conversion may be bound to several models."""
        with torch.inference_mode(False):
            return cls({name: value.clone() for name, value in parameters.items()})


def mark(model: Any, spec: SpikingConfig, neurons: Neurons) -> None:
    model.__dict__.pop(_SAVE, None)
    model.add_module(NEURONS, neurons)
    model.config.quantization_config = spec
    model.hf_quantizer = AutoHfQuantizer.from_config(spec)
    model.is_quantized = True


def unmark(model: Any) -> None:
    transform = decoded_transform(model.config.quantization_config)
    if not isinstance(transform, Untouched | Fuse):
        model.__dict__[_SAVE] = _refuse_saving
    delattr(model, NEURONS)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _refuse_saving(*arguments: Any, **options: Any) -> NoReturn:
    """Stand in for the save_pretrained of a model that is rotated, or has a prefix, and no neurons."""
    raise InputError(
        "a part of this model's transform works while it runs, and a folder would hold its weights "
        "alone: stages.convert gives it neurons, with which it is saved whole"
    )


def make_room(model: PreTrainedModel, spec: SpikingConfig, files: Sequence[str]) -> None:
    """Make empty buffers for the neurons' parameters, which the checkpoint of `files` fills.

    Raises InputError where it does not hold what the config says.
    """
    check(spec, files)
    with torch.device("cpu"):  # transformers makes a model on the meta device
        decoded_coding(spec), decoded_transform(spec)  # refused before any weight is read
    shapes = spec.parameters.items()
    empty = {n: torch.empty(shape, dtype=torch.float32, device="meta") for n, shape in shapes}
    model.add_module(NEURONS, Neurons(empty))


def attach(model: PreTrainedModel, spec: SpikingConfig) -> None:
    """Bind the neurons that a checkpoint has filled, behind the transform it was saved with, until
    the model's attachment is closed."""
    coding, transform = decoded_coding(spec), decoded_transform(spec)
    spec.coding, spec.transform = encode(coding), encode(transform)  # as it is saved again
    transform.restore(model)
    if spec.prefix:
        attach_prefix(model, spec.prefix)
    known = {site.name: site for site in find_sites(model)}
    missing = [name for name in spec.sites if name not in known]
    if missing:
        raise InputError(f"a config has neurons at {missing[0]}, which its model lacks; {AGAIN}")
    fitted_sites = [known[name] for name in spec.sites]
    unknown = torch.full((len(fitted_sites),), torch.nan, dtype=torch.float64)
    fitted = FittedNeurons(
        tuple(spec.sites),
        tuple(site.role for site in fitted_sites),
        tuple(site.layer for site in fitted_sites),
        Fit({}),
        unknown,
        unknown,
        unknown,
    )
    _attach(model, Conversion(coding, fitted))


def bind(model: PreTrainedModel, conversion: Conversion, spec: SpikingConfig) -> None:
    """Put neurons on a dense model in memory until its attachment is closed; it is saved with them.

    Raises InputError for a spiking model, and where a site is not one of this model's.
    """
    refuse_spiking(model)
    mark(model, spec, Neurons.copied(conversion.neurons.fit.params))
    _attach(model, conversion)


def _attach(model: PreTrainedModel, conversion: Conversion) -> Attachment:
    """Let the neurons of a marked model work; closing takes its mark off too."""
    conversion, neurons = held(model, conversion), model.get_submodule(NEURONS)
    with ExitStack() as stack:
        stack.callback(unmark, model)
        for handle in state_hooks(model):
            stack.callback(handle.remove)
        for cast in _CASTS:  # transformers refuses them for what a quantizer has cast already
            model.__dict__[cast] = partial(getattr(nn.Module, cast), model)
            stack.callback(model.__dict__.pop, cast)
        stack.enter_context(patched(model, conversion, held=neurons))
        bound = Attachment(conversion, stack.pop_all())
    record(model, bound, partial(_copied, model))
    return bound


def held(model: PreTrainedModel, conversion: Conversion) -> Conversion:
    """Return a conversion with the parameters that its model holds by now; those that are on disk are
    those of the conversion."""
    before, neurons = conversion.neurons.fit, model.get_submodule(NEURONS)
    now = dict(neurons.named_buffers())
    params = {
        n: before.params.get(n, value) if value.is_meta else value for n, value in now.items()
    }
    fit = Fit(params, before.curve)
    return replace(conversion, neurons=replace(conversion.neurons, fit=fit))


def _copied(model: Any, memo: dict[int, Any]) -> PreTrainedModel:
    """An independent spiking model, for copy.deepcopy.

    Hooks hold on to the modules and parameters they were made for, so both models get them again:
    what is copied is the dense model in between.
    """
    neurons, spec = getattr(model, NEURONS), model.config.quantization_config
    bound = attachment(model)
    assert bound is not None
    conversion = held(model, bound.conversion)
    bound.close()
    try:
        dense = deepcopy(model, memo)
    finally:
        mark(model, spec, neurons)
        bound.stack = _attach(model, conversion).stack  # a handle that somebody holds still closes
    mark(dense, spec, deepcopy(neurons, memo))
    _attach(dense, conversion)
    return dense
