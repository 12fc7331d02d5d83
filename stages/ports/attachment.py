"""What keeps the neurons of a loaded spiking model on; every stage starts from a dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
def pinned(model: PreTrainedModel, implementations: Mapping[str, str]) -> Iterator[None]:
    """Refuse copies of a model while the context is open, as its hooks are bound to what is in it, and
    other `implementations` of its parts, by part, than those that have ports."""

    def copied(memo: Any) -> NoReturn:
        raise InputError("a model is not copied while its sites are patched: copy the dense one")

    def pickled(protocol: Any) -> NoReturn:
        raise InputError(
            "a spiking model is not pickled: model.save_pretrained(folder) writes a loaded one, and "
            "stages.load(folder) reads it"
        )

    models = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    refusals = {part: _setters(part, implementations) for part in models}
    refusals[model] |= {_COPY: copied, _PICKLE: pickled}
    for part, methods in refusals.items():
        part.__dict__.update(methods)
    try:
        yield
    finally:
        for part, methods in refusals.items():
            for name in methods:
                part.__dict__.pop(name, None)


def _setters(
    part: PreTrainedModel, implementations: Mapping[str, str]
) -> dict[str, Callable[..., Any]]:
    """Stand-ins for the methods that would put products out of reach of the ports."""

    def standing_in(method: str, wanted: str) -> Callable[..., None]:
        def set_back(*arguments: Any, **options: Any) -> None:
            given = next(iter((*arguments, *options.values())), None)
            if given != wanted:
                raise InputError(
                    f"{method}({given!r}) would leave out neurons of this model: stages.restore(model) "
                    "makes it dense"
                )
            getattr(type(part), method)(part, wanted)

        return set_back

    names = {f"set_{kind}_implementation": wanted for kind, wanted in implementations.items()}
    return {method: standing_in(method, wanted) for method, wanted in names.items()}


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
