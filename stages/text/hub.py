"""Text from the Hugging Face hub."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

from stages.errors import InputError
from stages.model.hub import commit, reason
from stages.model.sources import HubText
from stages.text.documents import Piece


def read_hub(text: HubText, purpose: Literal["calibration", "evaluation"]) -> Iterator[Piece]:
    """Stream the documents for `purpose`, so that no more is downloaded than is used.

    All are of the commit that the revision of `text` stands for. Raises InputError where they cannot be
    read, or not to their end.
    """
    from huggingface_hub.errors import HTTPError

    split = text.calibration_split if purpose == "calibration" else text.split
    first = (
        (text.documents or 0)
        if purpose == "calibration" and text.calibration_split == text.split
        else 0
    )
    last = None if text.documents is None else first + text.documents
    revision = commit("dataset", text.id, text.revision)
    try:
        for row in islice(_rows(text, revision, split), first, last):
            if text.field not in row:
                raise ValueError(f"it has no field {text.field!r}, it has {', '.join(row)}")
            yield Piece(row[text.field])
    except InputError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, LookupError, HTTPError) as error:
        # no network, gated, a connection that broke; no such data set, split or field
        option = "calibration_path" if purpose == "calibration" else "path"
        raise InputError(
            f"text {text.id} ({split}) cannot be read from the hub: {reason(error)};"
            f" without it give corpus.NAME.{option}=FILE"
        ) from error


def _rows(text: HubText, revision: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a split, of this commit alone."""
    import datasets

    # with hf:// it is the hub's even where a folder here has its name
    builder = datasets.load_dataset_builder(
        f"hf://datasets/{text.id}", name=text.config, revision=revision
    )
    if builder.hash != revision:  # where the hub does not answer, any commit that was loaded before
        raise ConnectionError(f"the hub does not answer, so that commit {revision} is not at hand")
    yield from builder.as_streaming_dataset(split=split)
