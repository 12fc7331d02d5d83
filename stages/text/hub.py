"""Text from the Hugging Face hub."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

from stages.errors import InputError
from stages.model.hub import commit, reason
from stages.model.sources import HubText
from stages.text.documents import Piece

ADDRESS = "hf://datasets/"  # the hub's even where a folder here has its name


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
        data = builder(f"{ADDRESS}{text.id}", text.config, revision)
        for row in islice(data.as_streaming_dataset(split=split), first, last):
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


def builder(path: str, config: str | None, revision: str, **options: Any) -> Any:
    """Return what `datasets` makes of a data set on the hub at a commit, and of no other.

    `path` as `ADDRESS` begins it. Raises ConnectionError where the hub does not answer: `datasets` takes
    any commit then that it has read before.
    """
    import datasets

    made = datasets.load_dataset_builder(path, name=config, revision=revision, **options)
    if made.hash != revision:
        raise ConnectionError(f"the hub does not answer, so that commit {revision} is not at hand")
    return made
