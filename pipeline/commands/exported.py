"""What verbs of an exported model share: arguments without a configuration, and the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stages.errors import InputError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Request = TypeVar("Request")


def parsed(kind: type[Request], places: Sequence[str], arguments: Sequence[str]) -> Request:
    """The dataclass `kind` of key=value arguments; `places` are the fields that a word without a key
    fills, in order.

    A value is taken as it is, to the end of its argument.
    """
    declared: tuple[Field[Any], ...] = fields(kind)  # type: ignore[arg-type]
    kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in declared}
    free = [name for name in places if not any(a.startswith(f"{name}=") for a in arguments)]
    values: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not (equals and name in kinds):
            near = nearest(name, kinds) if equals else ""
            if near or not free:
                hint = f"{near} give key=value with {', '.join(kinds)}".lstrip()
                raise InputError(f"got {argument!r}: {hint}")
            name, value = free.pop(0), argument
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise InputError(f"{name}={value!r}: give a number") from None
    absent = [f.name for f in declared if f.default is MISSING and f.name not in values]
    if absent:
        raise InputError(f"give {' and '.join(f'{name}=…' for name in absent)}")
    return kind(**values)


def check_dtype(dtype: str) -> None:
    """Raises InputError unless weights can be loaded in `dtype`."""
    from stages.model.loading import DTYPES

    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype}: choose {', '.join(DTYPES)}")


def loaded(
    model_path: str, dtype: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The spiking model and its tokenizer; raises InputError where one of them is not there."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    import stages
    from pipeline.run.devices import resolve
    from stages.model.loading import check_folder, readable

    logging.disable_progress_bar()
    folder, place = Path(model_path).expanduser(), resolve(device, "device")
    model: Any = stages.load(model_path, dtype=getattr(torch, dtype))
    check_folder(folder)
    with readable(f"the tokenizer of {folder}", "export the model again"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.to(place), tokenizer
