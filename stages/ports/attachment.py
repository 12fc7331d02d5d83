"""What keeps the neurons of a loaded spiking model on; every stage starts from a dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from transformers import PreTrainedModel

from stages.errors import InputError
from stages.fitted import Conversion

_RECORD = "spiking_attachment"
_COPY, _PICKLE = "__deepcopy__", "__reduce_ex__"  # looked up on the model before its class


@dataclass
class Attachment:
    """What a loaded model was converted with; `close` takes the neurons off, once and for good."""

    conversion: Conversion
    stack: ExitStack

    def close(self) -> None:
        self.stack.close()


def record(
    model: PreTrainedModel, bound: Attachment, copied: Callable[[dict[int, Any]], PreTrainedModel]
) -> None:
    """Record what keeps the neurons of a model on until it is closed, and how the model is copied."""
    model.__dict__[_RECORD] = bound
    model.__dict__[_COPY] = copied
    bound.stack.callback(model.__dict__.pop, _RECORD)


@contextmanager
def pinned(model: PreTrainedModel) -> Iterator[None]:
    """Refuse copies of a model while the context is open: its hooks are bound to what is in it."""

    def copied(memo: Any) -> NoReturn:
        raise InputError("a model is not copied while its sites are patched: copy the dense one")

    def pickled(protocol: Any) -> NoReturn:
        raise InputError(
            "a spiking model is not pickled: model.save_pretrained(folder) writes a loaded one, and "
            "stages.load(folder) reads it"
        )

    model.__dict__ |= {_COPY: copied, _PICKLE: pickled}
    try:
        yield
    finally:
        for name in (_COPY, _PICKLE):
            del model.__dict__[name]


def attachment(model: PreTrainedModel) -> Attachment | None:
    """Return what binds the neurons of a loaded spiking model; None of a dense one."""
    present: Attachment | None = model.__dict__.get(_RECORD)
    return present


def refuse_spiking(model: PreTrainedModel) -> None:
    """Raise InputError for a loaded spiking model, which would be coded twice."""
    if attachment(model) is not None:
        raise InputError(
            "the model is a spiking one already, and this needs the dense one: "
            "stages.restore(model) takes its neurons off"
        )
