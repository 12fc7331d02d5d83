"""Batches of a pass that several processes share: what each of them leaves by itself.

A pass adds up what every batch leaves, in their order. So batches may pass in any process: what one
has left, added up in the same order, gives the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stages.model.offload import offloaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Part = dict[str, Tensor]  # what a batch leaves, on the CPU
FILE = "part.safetensors"
Run = Callable[[Iterable[Tensor], Callable[[], None]], None]


@dataclass(frozen=True)
class Share:
    """A batch ids [B, S] to be run here, by its number in the pass; `leave` takes what it has left."""

    number: int
    tokens: Tensor
    leave: Callable[[Part], None]


def run_shares(
    model: PreTrainedModel, shares: Iterable[Share], take: Callable[[], Part], run: Run
) -> None:
    """Let `run(batches, after)` pass the batches through the model, and hand on what each leaves.

    `take` gives what has been measured since it was last asked. Of a model in memory the next share is
    asked for when one is done; where one layer at a time is, all are asked for and pass together, so
    that every layer is read once. There is one share at least.
    """
    if offloaded(model) is None:
        run(_one_by_one(shares, take), lambda: None)
        return
    held = list(shares)
    parts: list[Part] = [{} for _ in held]
    turn = itertools.cycle(parts)

    def after() -> None:
        part = next(turn)  # batches pass every layer in their order
        for name, value in take().items():
            part[name] = part[name] + value if name in part else value

    run([share.tokens for share in held], after)
    for share, part in zip(held, parts, strict=True):
        share.leave(part)


def _one_by_one(shares: Iterable[Share], take: Callable[[], Part]) -> Iterator[Tensor]:
    for share in shares:
        yield share.tokens
        share.leave(take())  # asked for the next one: this one has passed


def save(part: Part, folder: Path) -> None:
    """Write what a batch has left into a folder."""
    save_file({name: value.contiguous() for name, value in part.items()}, folder / FILE)


@dataclass(frozen=True)
class Parts:
    """What the batches of a pass have left, in their order, each in a folder that `save` has filled."""

    folders: Sequence[Path]

    def __iter__(self) -> Iterator[Part]:
        return self.chosen(lambda name: True)

    def chosen(self, wanted: Callable[[str], bool]) -> Iterator[Part]:
        """Yield every part with the tensors of these names alone, one part at a time."""
        for folder in self.folders:
            with safe_open(folder / FILE, "pt") as file:
                yield {name: file.get_tensor(name) for name in filter(wanted, file.keys())}
