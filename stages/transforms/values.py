"""Which rows of a projection make the values of every key head, however it lays out q, k and v."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.errors import InputError
from stages.model.sites import Site, find_sites, rows
from stages.ports.port import DensePort

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DIGIT = 128  # numbers below are exact in every type that a model may have


@dataclass(frozen=True)
class Values:
    """rows [G, D]: of the weight of consumer `reader` of attn.in, by key head."""

    reader: int
    rows: Tensor


class _Reached(Exception):
    """Ends a pass where values enter attention."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values


class _Stop(DensePort):
    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        raise _Reached(x)


def _digits(
    model: PreTrainedModel, readers: Sequence[str], firsts: Sequence[int], port: Site, unit: int
) -> Tensor:
    """What reaches attention as values [G, D] where every output gives one digit of its number."""
    from stages.ports.hooks import attached  # and with it transformers, which a plan does not need

    def numbered(first: int) -> Callable[..., Tensor]:
        def hook(_: Any, args: Any, y: Tensor) -> Tensor:
            numbers = torch.arange(first, first + y.shape[-1], device=y.device) // unit % DIGIT
            return numbers.to(y.dtype).expand(y.shape)

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(numbered(first))
        for name, first in zip(readers, firsts, strict=True)
    ]
    try:
        with torch.no_grad(), attached(model, find_sites(model), {port.name: _Stop()}):
            model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    except _Reached as reached:
        return reached.values[0, :, 0]
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError(f"no values reach {port.name}")


def value_rows(model: PreTrainedModel, sites: Sequence[Site]) -> Values:
    """Find the rows by a pass in which projections give the numbers of their outputs.

    Raises InputError where something else than a lay-out stands between projection and attention.
    """
    readers = next(site.consumers for site in sites if site.role == "attn.in")
    port = next(site for site in sites if site.role == "attn.v")
    sizes = [len(rows(model.get_submodule(name))) for name in readers]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]

    seen, power = torch.zeros((), dtype=torch.float64), 0
    while power == 0 or DIGIT**power < sum(sizes):
        seen = seen + _digits(model, readers, firsts, port, DIGIT**power).double() * DIGIT**power
        power += 1
    numbers = seen.round().long()
    reader = max(i for i, first in enumerate(firsts) if first <= int(numbers.min()))
    numbers = numbers - firsts[reader]
    if (
        bool((seen.round() != seen).any())
        or len(numbers.unique()) != numbers.numel()
        or int(numbers.max()) >= sizes[reader]
    ):
        raise InputError(
            f"transform: values are changed between {readers[-1]} and attention (a clip, a norm), which a "
            "rotation of heads does not pass; use transform=none or transform=fuse"
        )
    return Values(reader, numbers)
