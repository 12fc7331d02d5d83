"""The one way that windows pass through a model, in memory or layer by layer from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stages.model.offload import OUTSIDE, Weights, device_of, offloaded
from stages.model.products import products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Consume = Callable[[Tensor, Tensor], None]
Windows = Tensor | Iterable[Tensor]  # all ids [W, S], or their batches
TUPLES = ("GPTNeoBlock", "BloomBlock", "MptBlock", "FalconDecoderLayer")  # layers that give one


def windows(
    model: PreTrainedModel,
    ids: Windows,
    batch: int,
    name: str,
    *,
    consume: Consume = lambda tokens, logits: None,
    after: Callable[[], None] = lambda: None,
    through: Callable[[int], None] = lambda layer: None,
    logits: int = 0,
) -> None:
    """Run full windows ids [W, S] of whole numbers, `batch` at a time, without a cache.

    Batches of them that are given one by one pass as they come, each before the next is asked for; where
    one layer at a time is in memory, all are asked for first.

    `consume` gets the tokens and logits of every batch. `after` is called once a batch has passed,
    where one layer at a time is in memory once it has passed each of them; `through` with a layer's
    index (-1: what is in none) once every batch has. The head sees the last `logits` tokens of a
    window, 0 for all.
    """
    device, weights = device_of(model), offloaded(model)
    parts = ids.split(batch) if isinstance(ids, Tensor) else ids
    if weights is not None:
        batches = [part.to(device, torch.int64) for part in parts]
        with products(model):
            _layered(model, weights, batches, name, consume, after, through, logits)
        return
    with products(model):
        for part in tqdm(parts, desc=name, unit="batch", disable=None):
            tokens = part.to(device, torch.int64)  # here, as a long text lies on disk
            consume(tokens, model(tokens, use_cache=False, logits_to_keep=logits).logits)
            after()
    for layer in (*range(model.config.num_hidden_layers), OUTSIDE):
        through(layer)


def _layered(
    model: PreTrainedModel,
    weights: Weights,
    batches: Sequence[Tensor],
    name: str,
    consume: Consume,
    after: Callable[[], None],
    through: Callable[[int], None],
    logits: int,
) -> None:
    layers = weights.layers
    shape = (sum(map(len, batches)), batches[0].shape[1], model.config.hidden_size)
    order = (OUTSIDE, *range(len(layers)), OUTSIDE)
    with weights.spec.states(shape, model.dtype) as states, weights.in_turn(order) as turn:
        boundary = states.split(len(batches[0]))
        with turn():
            calls = _enter(model, layers, batches, boundary)
        for index, layer in enumerate(tqdm(layers, desc=name, unit="layer", disable=None)):
            with turn():
                for tokens, hidden in zip(batches, boundary, strict=True):
                    args, kwargs = calls[len(tokens)][index]
                    out = layer(hidden.to(weights.device), *args, **kwargs)
                    hidden.copy_(out[0] if isinstance(out, tuple) else out)
                    after()
            through(index)
        with turn():
            for tokens, hidden in zip(batches, boundary, strict=True):
                with _replaced(layers, _leaving(hidden.to(weights.device))):
                    out = model(tokens, use_cache=False, logits_to_keep=logits)
                consume(tokens, out.logits)
                after()
    through(OUTSIDE)


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _enter(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    batches: Sequence[Tensor],
    boundary: Sequence[Tensor],
) -> dict[int, list[Call]]:
    """Fill the boundary in front of the first layer; the further arguments of every layer, by the
    number of windows of a batch: masks and positions of full windows are the same in all of them."""
    calls: dict[int, list[Call]] = {}
    for tokens, hidden in zip(batches, boundary, strict=True):
        seen: list[Call] = []

        def note(index: int, x: Tensor, *args: Any, seen: Any = seen, **kwargs: Any) -> Tensor:
            seen.append((args, kwargs))
            if index == len(layers) - 1:
                raise _Entered(x)
            return x

        with _replaced(layers, note):
            try:
                model(tokens, use_cache=False, logits_to_keep=1)
            except _Entered as entered:
                hidden.copy_(entered.hidden)
        calls.setdefault(len(tokens), seen)
    return calls


def _leaving(states: Tensor) -> Callable[..., Tensor]:
    """Layers that together return `states`, whatever enters the first of them."""

    def forward(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return states if index == 0 else hidden

    return forward


class _Entered(Exception):
    """Ends a pass in front of the final norm, whose ports must not see what no layer has made."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@contextmanager
def _replaced(layers: nn.ModuleList, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let every layer compute forward(index, hidden, ...) while the context is open."""

    def bound(index: int) -> Callable[..., Tensor]:
        def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return forward(index, hidden_states, *args, **kwargs)

        return call

    # Some decoders take the first of what a layer gives.
    first = type(layers[0]).__name__ in TUPLES

    def given(index: int) -> Callable[..., Any]:
        call = bound(index)
        return (lambda *args, **kwargs: (call(*args, **kwargs), None)) if first else call

    try:
        for index, layer in enumerate(layers):
            layer.__dict__["forward"] = given(index)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
