"""What keeps the neurons of a loaded spiking model on; every stage starts from a dense one."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from stages.errors import InputError

if TYPE_CHECKING:
    from stages.patching import Conversion

_RECORD = "spiking_attachment"


@dataclass
class Attachment:
    """What a loaded model was converted with; `close` takes the neurons off, once and for good."""

    conversion: Conversion
    stack: ExitStack

    def close(self) -> None:
        self.stack.close()


def record(model: PreTrainedModel, conversion: Conversion, stack: ExitStack) -> None:
    """Says that `stack` keeps the neurons of a model on until it is closed."""
    model.__dict__[_RECORD] = Attachment(conversion, stack)
    stack.callback(model.__dict__.pop, _RECORD)


def attachment(model: PreTrainedModel) -> Attachment | None:
    """What binds the neurons of a loaded spiking model; None of a dense one."""
    found: Attachment | None = model.__dict__.get(_RECORD)
    return found


def refuse_spiking(model: PreTrainedModel) -> None:
    """Raises InputError for a loaded spiking model, which would be coded twice."""
    if attachment(model) is not None:
        raise InputError(
            "the model is a spiking one already, and this needs the dense one: "
            "stages.restore(model) takes its neurons off"
        )
