"""Text from the Hugging Face hub."""

from collections.abc import Iterator
from itertools import islice
from typing import Literal

from stages.errors import InputError
from stages.model.sources import HubText
from stages.text.documents import Piece


def read_hub(text: HubText, purpose: Literal["calibration", "evaluation"]) -> Iterator[Piece]:
    """Stream the documents for `purpose`, so that no more is downloaded than is used."""
    import datasets

    split = text.calibration_split if purpose == "calibration" else text.split
    first = (
        (text.documents or 0)
        if purpose == "calibration" and text.calibration_split == text.split
        else 0
    )
    last = None if text.documents is None else first + text.documents
    try:
        rows = datasets.load_dataset(
            text.id, name=text.config, revision=text.revision, split=split, streaming=True
        )
        for row in islice(rows, first, last):
            yield Piece(row[text.field])
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        # no network, gated, no such data set, split or field
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        option = "calibration_path" if purpose == "calibration" else "path"
        raise InputError(
            f"text {text.id} ({split}) cannot be read from the hub: {reason};"
            f" without it give corpus.NAME.{option}=FILE"
        ) from error
