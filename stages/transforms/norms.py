"""Norms of a model: what each computes, and which linear modules read its output and nothing else does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.errors import InputError
from stages.model.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE = 4  # tokens of the passes that look at a model
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of logits, relative; few bits round more
_ROUNDED = 0.3


@dataclass(frozen=True)
class StreamNorm:
    """A norm whose output linear modules read: x / rms(x), of x less its mean where `centred`, times
    weight + `offset` (1 in Gemma), plus its bias."""

    path: str
    module: Any
    offset: int
    centred: bool
    readers: tuple[str, ...]

    def scale(self) -> Tensor | None:
        """Return what it multiplies by, in double precision, None where there is no weight."""
        weight: Tensor | None = getattr(self.module, "weight", None)
        return None if weight is None else weight.double() + self.offset

    def make_plain(self, change: Callable[[Tensor], Tensor] = lambda shift: shift) -> None:
        """Take its scale off, which its readers have, and let its shift be what they need, changed."""
        scale, bias = self.scale(), getattr(self.module, "bias", None)
        if bias is not None:
            shift = bias.double() if scale is None else bias.double() / scale
            bias.copy_(change(shift[None])[0])
        if scale is not None:
            self.module.weight.fill_(1 - self.offset)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm itself, not a list of those of every head."""
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def kind(path: str, norm: Any, hidden: int) -> tuple[int, bool]:
    """Return offset and `centred` of a norm of the stream, `hidden` wide, by what it makes of an input;
    InputError if it is neither a LayerNorm nor an RMSNorm."""
    weight = getattr(norm, "weight", None)
    width = _width(norm, hidden)
    like = torch.empty(()) if weight is None else weight
    with torch.no_grad():
        x = torch.linspace(-900, 1000, width, device=like.device).roll(width // 3).to(like.dtype)
        bias = getattr(norm, "bias", None)
        shift = 0.0 if bias is None else bias.double()
        found = norm(x[None])[0].double() - shift
        for centred in (False, True):
            plain = x.double() - (x.double().mean() if centred else 0.0)
            plain = plain * plain.square().mean().rsqrt()
            for offset in (0, 1):
                exact = plain if weight is None else plain * (weight.double() + offset)
                if (found - exact).abs().max() <= 0.02 * exact.abs().max():
                    return offset, centred
    raise InputError(
        f"transform: {path} is a {type(norm).__name__}, which is not x / rms(x) * weight, nor that of x "
        "less its mean; use transform=none"
    )


def has_scale(norm: Any) -> bool:
    """Return whether a norm multiplies by anything but one."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.dim() != 1:
        return weight is not None
    return bool((weight + kind("", norm, len(weight))[0] != 1).any())


def stream_norms(model: PreTrainedModel, sites: Sequence[Site]) -> list[StreamNorm]:
    """Find the norms whose output linear modules alone read, by passes of a few tokens.

    Raises InputError for one that something else reads, too, or that is no known norm.
    """
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    linears = dict.fromkeys(name for site in sites for name in site.consumers)
    readers = _readers(model, norms, {name: model.get_submodule(name) for name in linears})
    read = {path: names for path, names in readers.items() if names}
    _check_alone(model, read)
    found, hidden = [], model.config.hidden_size
    for path, names in read.items():
        norm = StreamNorm(path, norms[path], *kind(path, norms[path], hidden), tuple(names))
        scale = norm.scale()
        small = None if scale is None else scale.abs() < 1e-6 * scale.abs().max()
        if (
            getattr(norm.module, "bias", None) is not None
            and small is not None
            and bool(small.any())
        ):
            raise InputError(
                f"transform: {path} has scales of zero beside its shifts, which cannot be divided by "
                "them; use transform=none"
            )
        found.append(norm)
    return found


def _readers(
    model: PreTrainedModel, norms: Mapping[str, nn.Module], linears: Mapping[str, nn.Module]
) -> dict[str, list[str]]:
    """The linear modules that are given the output of every norm: the same place in memory."""
    made: dict[int, tuple[str, Tensor]] = {}  # kept alive, so that no place is used twice
    readers: dict[str, list[str]] = {name: [] for name in norms}

    def write(name: str) -> Callable[..., None]:
        return lambda _, args, y: made.update({y.data_ptr(): (name, y)})

    def read(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            place = made.get(args[0].data_ptr())
            if place is not None and name not in readers[place[0]]:
                readers[place[0]].append(name)

        return hook

    handles = [norm.register_forward_hook(write(name)) for name, norm in norms.items()]
    handles += [linear.register_forward_pre_hook(read(name)) for name, linear in linears.items()]
    try:
        _logits(model)
    finally:
        for handle in handles:
            handle.remove()
    return readers


def _check_alone(model: PreTrainedModel, readers: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError where a norm is read by more than its readers: scaled there and unscaled in
    front of them, the logits would change."""
    before = _logits(model)
    if not _changed(before, _rescaled(model, readers), model.dtype):
        return
    for path, names in readers.items():
        if _changed(before, _rescaled(model, {path: names}), model.dtype):
            raise InputError(
                f"transform: {path} is read by more than linear modules ({', '.join(names[:3])}), so "
                "that its scale cannot become part of their weights; use transform=none"
            )


def _rescaled(model: PreTrainedModel, readers: Mapping[str, Sequence[str]]) -> Tensor:
    """Logits with the output of norms times random numbers, by which their readers divide."""
    generator = torch.Generator().manual_seed(0)
    handles: list[Any] = []
    try:
        for path, names in readers.items():
            norm: Any = model.get_submodule(path)
            width = _width(norm, model.config.hidden_size)
            factor = 2.0 ** torch.randint(-1, 2, (width,), generator=generator)  # exact in any type

            def scale(_: nn.Module, args: Any, y: Tensor, factor: Tensor = factor) -> Tensor:
                return y * factor.to(y)

            def unscale(_: nn.Module, args: Any, factor: Tensor = factor) -> Any:
                return (args[0] / factor.to(args[0]), *args[1:])

            handles.append(norm.register_forward_hook(scale))
            handles += [model.get_submodule(n).register_forward_pre_hook(unscale) for n in names]
        return _logits(model)
    finally:
        for handle in handles:
            handle.remove()


def _width(norm: Any, hidden: int) -> int:
    weight, shape = getattr(norm, "weight", None), getattr(norm, "normalized_shape", None)
    return int(weight.shape[-1]) if weight is not None else math.prod(shape or (hidden,))


def _logits(model: PreTrainedModel) -> Tensor:
    """Logits of a few tokens, [1, S, V]."""
    ids = torch.arange(PROBE, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False).logits
    return logits


def _changed(before: Tensor, after: Tensor, dtype: torch.dtype) -> bool:
    far = (after.float() - before.float()).abs().max() / before.float().abs().max()
    return not bool(far <= _TOLERANCE.get(dtype, _ROUNDED))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Leave dropout out while the context is open."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def same_logits(model: PreTrainedModel, what: str) -> Iterator[None]:
    """Raise InputError where logits are others behind the context: something was not thought of."""
    before = _logits(model)
    yield
    if _changed(before, _logits(model), model.dtype):
        raise InputError(
            f"transform: {what} changed the logits of this model_type={model.config.model_type!r}, whose "
            "weights are of no use now: load it again, with transform=none"
        )
