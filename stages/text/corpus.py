"""Texts to calibrate and evaluate on: where they come from, their tokens, their windows."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stages.errors import InputError
from stages.model.sources import HubText, PackageFile
from stages.text.documents import ROWS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Purpose = Literal["calibration", "evaluation"]
_SAME_TEXT = 200  # characters; shorter documents (headings, empty lines) recur in any text


@dataclass(frozen=True)
class Corpus:
    """A named text with a part to calibrate on and a part to evaluate on.

    `path` (evaluation) and `calibration_path` are the user's files, or folders of shards, and
    win over `package`, a Wikipedia dump in a wheel, and `hub`. `field` is the text column of the
    files, `rows` what a plain text file is read as; `join` is put between documents before they are
    tokenised, as one text.
    """

    name: str
    package: PackageFile | None = None
    hub: HubText | None = None
    path: str | None = None
    calibration_path: str | None = None
    field: str = "text"
    join: str = "\n\n"
    rows: str = "document"

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise InputError(
                f"corpus.{self.name}.rows={self.rows!r}: choose {', '.join(ROWS[:-1])} or {ROWS[-1]}"
            )
        self._check_types()
        if self.path is not None and self.path == self.calibration_path:
            raise InputError(
                f"corpus {self.name}: path and calibration_path are both {self.path};"
                " calibration and evaluation need two texts"
            )

    def _check_types(self) -> None:
        texts = {name: getattr(self, name) for name in ("field", "join")}
        texts |= {n: v for n in ("path", "calibration_path") if (v := getattr(self, n)) is not None}
        for name, value in texts.items():
            if not isinstance(value, str):
                raise InputError(
                    f"corpus.{self.name}.{name}={value!r} is no text; put it in quotes"
                )
        for name, kind in (("package", PackageFile), ("hub", HubText)):
            value = getattr(self, name)
            if not isinstance(value, kind | None):
                raise InputError(
                    f"corpus.{self.name}.{name}={value!r} is no {kind.__name__}: give "
                    f"corpus.{self.name}.path=FILE, or an entry as those in conf/corpus/default.yaml"
                )

    def origin(self, purpose: Purpose) -> Path | PackageFile | HubText:
        """Return where the text for `purpose` lies; InputError if this corpus has none for it."""
        given = self.calibration_path if purpose == "calibration" else self.path
        if given is not None:
            return Path(given).expanduser()
        if self.path is not None or self.calibration_path is not None:
            option = "calibration_path" if purpose == "calibration" else "path"
            raise InputError(
                f"corpus {self.name} has no {purpose} text: one file cannot serve calibration and"
                f" evaluation; give corpus.{self.name}.{option}=FILE or choose another corpus"
            )
        origin = self.package or self.hub
        if origin is None:
            raise InputError(f"corpus {self.name} has no source; give corpus.{self.name}.path=FILE")
        return origin


def present(name: str, rows: Sequence[str | None]) -> list[str]:
    """Return the rows that have a text; how many are null is logged."""
    odd = [row for row in rows if not isinstance(row, str | None)]
    if odd:
        raise InputError(f"corpus {name}: {str(odd[0])[:80]!r} is no text; give another field")
    texts = [text for text in rows if text is not None]
    if len(texts) < len(rows):
        absent = len(rows) - len(texts)
        log.warning("corpus %s: %d of %d rows are null and left out", name, absent, len(rows))
    return texts


def fingerprints(documents: Sequence[str]) -> list[str]:
    """Hash every document of 200 characters or more, by sha256."""
    long = (text.strip() for text in documents if len(text.strip()) >= _SAME_TEXT)
    return [hashlib.sha256(text.encode()).hexdigest() for text in long]


def check_disjoint(calibration: Sequence[str], evaluation: Sequence[str]) -> None:
    """Raise InputError if two texts, given by their fingerprints, have a document in common."""
    shared = set(calibration) & set(evaluation)
    if shared:
        raise InputError(
            f"{len(shared)} documents are in the calibration and in the evaluation text; choose"
            " another calibration.corpus or other files"
        )


def tokenise(documents: Sequence[str], join: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Turn documents, joined to one text, into token ids [N] int64.

    A begin-of-sequence token is there only if the tokenizer adds one by itself, then once.
    """
    import torch

    ids = tokenizer(join.join(documents), verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def windows(
    ids: Tensor,
    count: int,
    length: int,
    skip: int = 0,
    name: str = "corpus",
    begin: int | None = None,
) -> Tensor:
    """Cut the first `count` non-overlapping windows [count, length] after `skip` tokens.

    With `begin` every window is that token and length - 1 tokens of the text; one that the tokenizer
    has put in front of the text is not repeated.
    """
    import torch

    if count < 1 or length < 2 or skip < 0:
        raise InputError(
            f"windows: got {count} of {length} tokens after {skip};"
            " needs 1 or more, of 2 or more, after 0 or more"
        )
    first = [] if begin is None else [begin]
    if first and ids[:1].tolist() == first:
        ids = ids[1:]
    width = length - len(first)
    needed = skip + count * width
    if len(ids) < needed:
        raise InputError(
            f"{name} has {len(ids)} tokens, {count} windows of {width} tokens"
            f"{f' after {skip}' if skip else ''} need {needed}; give a longer text or fewer windows"
        )
    texts = ids[skip:needed].reshape(count, width)
    return torch.cat([texts.new_tensor(first).expand(count, -1), texts], 1)
