"""The tokens that a transform keeps in front of every text of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RECORD = "prefix_ids"


def record_prefix(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Record which tokens are kept in front of every text of a model."""
    model.__dict__[_RECORD] = tuple(ids)


def prefix_length(model: PreTrainedModel) -> int:
    """Count the tokens kept in front of every text; 0 for a model without a prefix."""
    return len(prefix_ids(model))


def prefix_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the tokens kept in front of every text."""
    return tuple(model.__dict__.get(_RECORD, ()))
