"""The documents of a text put together to one, as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from stages.errors import InputError
from stages.text.documents import Piece

_SAME_TEXT = 200  # characters; shorter documents (headings, empty lines) recur in any text
_HEAD = 1 << 16  # characters that identify a document


@dataclass
class Read:
    """What has been read of a text: how many rows, how many of them null, and the fingerprints of its
    documents."""

    rows: int = 0
    null: int = 0
    documents: list[str] = field(default_factory=list)


def joined(name: str, pieces: Iterable[Piece], join: str, read: Read) -> Iterator[str]:
    """Yield the parts of one text, the documents with `join` between them; null rows are left out.

    `read` counts along. Raises InputError for a row of corpus `name` that is no text.
    """
    inside = False
    for text, more in pieces:
        if not inside:
            read.rows += 1
            if text is None:
                read.null += 1
                continue
            if not isinstance(text, str):
                raise InputError(
                    f"corpus {name}: {str(text)[:80]!r} is no text; give another field"
                )
            if read.rows - read.null > 1:
                yield join
            read.documents += fingerprints([text])
        if text is not None:
            yield text
        inside = more


def fingerprints(documents: Sequence[str]) -> list[str]:
    """Hash every document of 200 characters or more by sha256, a long one by its first 65 536."""
    long = (text.strip()[:_HEAD] for text in documents if len(text.strip()) >= _SAME_TEXT)
    return [hashlib.sha256(text.encode()).hexdigest() for text in long]


def check_disjoint(calibration: Sequence[str], evaluation: Sequence[str]) -> None:
    """Raise InputError if two texts, given by their fingerprints, have a document in common."""
    shared = set(calibration) & set(evaluation)
    if shared:
        raise InputError(
            f"{len(shared)} documents are in the calibration and in the evaluation text; choose"
            " another calibration.corpus or other files"
        )
