"""Transforms: what is done to a model before anything is captured, the same for every coding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from stages.errors import InputError
from stages.registry import register
from stages.transforms.rotation import declare, fuse, rotate, rotate_online
from stages.transforms.search import PrefixSearch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RECORD = "transform"


@runtime_checkable
class Transform(Protocol):
    """`apply` changes a freshly loaded model in place; `prefix` are the ids that `search` gives."""

    @property
    def name(self) -> str: ...
    @property
    def search(self) -> PrefixSearch | None:
        """How the ids of a prefix are searched on calibration; None for a transform without one."""

    def apply(self, model: PreTrainedModel, prefix: tuple[int, ...]) -> None: ...

    def declare(self, model: PreTrainedModel) -> None:
        """Record on a model without weights what its operations will be."""

    def restore(self, model: PreTrainedModel) -> None:
        """Return what `apply` did beside changing weights, on a model whose saved weights are changed."""


def applied(model: PreTrainedModel) -> Transform:
    """Return the transform that a model has behind it, in this process or when it was saved."""
    transform: Transform = model.__dict__.get(_RECORD, Untouched())
    return transform


def _record(model: PreTrainedModel, transform: Transform) -> None:
    model.__dict__[_RECORD] = transform


class _WithoutPrefix:
    """What a transform is that has no prefix and changes nothing but weights."""

    @property
    def search(self) -> None:
        return None

    def declare(self, model: PreTrainedModel) -> None:
        """Do nothing: the operations stay what they are."""

    def restore(self, model: PreTrainedModel) -> None:
        """Record the transform: all that it does is in the weights."""
        _record(model, self)  # type: ignore[arg-type]


@register("transform/none", was="stages.llm.transforms.Untouched")
@dataclass(frozen=True)
class Untouched(_WithoutPrefix):
    """The model as it was trained."""

    name: str = "none"

    def apply(self, model: PreTrainedModel, prefix: tuple[int, ...]) -> None:
        """Do nothing."""


@register("transform/fuse", was="stages.llm.transforms.Fuse")
@dataclass(frozen=True)
class Fuse(_WithoutPrefix):
    """The scales of norms as part of the weights behind them, so that no spike is scaled by one."""

    name: str = "fuse"

    def apply(self, model: PreTrainedModel, prefix: tuple[int, ...]) -> None:
        fuse(model)
        _record(model, self)


@register("transform/rotate", was="stages.llm.transforms.Rotate")
@dataclass(frozen=True)
class Rotate(_WithoutPrefix):
    """Norm scales fused, residual stream, heads and down_proj inputs rotated; `seed` draws signs."""

    name: str
    seed: int

    def apply(self, model: PreTrainedModel, prefix: tuple[int, ...]) -> None:
        rotate(model, self.seed)
        _record(model, self)

    def declare(self, model: PreTrainedModel) -> None:
        declare(model)

    def restore(self, model: PreTrainedModel) -> None:
        rotate_online(model, self.seed)
        _record(model, self)


@register("transform/rotate_prefix", was="stages.llm.transforms.RotatePrefix")
@dataclass(frozen=True)
class RotatePrefix:
    """`Rotate`, and attention sinks kept in front of every text as a prefix of the KV cache."""

    name: str
    seed: int
    search: PrefixSearch

    def apply(self, model: PreTrainedModel, prefix: tuple[int, ...]) -> None:
        from stages.transforms.prefix import attach_prefix  # takes seconds to import what it needs

        rotate(model, self.seed)
        attach_prefix(model, prefix)
        _record(model, self)

    def declare(self, model: PreTrainedModel) -> None:
        raise InputError(
            f"transform={self.name}: its prefix is searched on calibration, so dimensions alone do not "
            "give its operations; transform=rotate differs by the prefix keys only"
        )

    def restore(self, model: PreTrainedModel) -> None:
        rotate_online(model, self.seed)  # its prefix is attached where the ids are known
        _record(model, self)
