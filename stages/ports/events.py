"""The spikes of a plane, one by one: what they select of a weight is added up where they are few.

On a CPU that takes less time than a dense product below one spike in sixteen values, with the search for
them; other devices multiply the whole plane.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

FEW = 16
_TYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Events:
    """The spikes of rows [R, C]: `channel` [E] in the order of rows, `first` [R] that of each row, `sign`
    [E] what each counts."""

    channel: Tensor
    first: Tensor
    sign: Tensor

    def selected(self, weight: Tensor) -> Tensor:
        """Return the sums [R, O] of the rows of a weight [C, O], contiguous, that the spikes select."""
        return functional.embedding_bag(
            self.channel, weight, self.first, mode="sum", per_sample_weights=self.sign
        )


def few(plane: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the spikes of an int8 plane [*X] are added up one by one in products of `dtype`."""
    fits = plane.device.type == "cpu" and dtype in _TYPES
    return fits and int(plane.count_nonzero()) * FEW < plane.numel()


def events(plane: Tensor, unit: Tensor | None, dtype: torch.dtype) -> Events:
    """Find the spikes of a plane [*X, C], each of which counts what `unit` [*X, C] is there, or 1."""
    flat, channels = plane.reshape(-1), plane.shape[-1]
    place = _places(flat)
    starts = torch.arange(0, len(flat), channels, device=plane.device)
    sign = flat[place].to(dtype)
    if unit is not None:
        sign = sign * unit.reshape(-1)[place].to(dtype)
    return Events(place % channels, torch.searchsorted(place, starts), sign)


def _places(flat: Tensor) -> Tensor:
    """Where bytes [N] are not zero, [E]; most are, so that they are looked through eight at once."""
    if len(flat) % 8 or flat.storage_offset() % 8:
        return flat.nonzero().view(-1)
    word = flat.view(torch.int64).nonzero()
    row, byte = flat.view(-1, 8)[word.view(-1)].nonzero(as_tuple=True)
    return word.view(-1)[row] * 8 + byte
