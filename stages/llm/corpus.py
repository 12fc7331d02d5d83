"""Texts to calibrate and evaluate on: where they come from, their tokens, their windows."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stages.errors import InputError
from stages.llm.sources import HubText, PackageFile

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Purpose = Literal["calibration", "evaluation"]
_SUFFIXES = (".txt", ".text", ".raw", ".jsonl", ".jsonl.gz", ".parquet")
_SAME_TEXT = 200  # characters; shorter documents (headings, empty lines) recur in any text


@dataclass(frozen=True)
class Corpus:
    """A named text with a part to calibrate on and a part to evaluate on.

    `path` (evaluation) and `calibration_path` are the user's own files and win over `package`, a
    Wikipedia dump in a wheel, and `hub`. `field` is the text column of the files; `join` is put
    between documents before they are tokenised, as one text.
    """

    name: str
    package: PackageFile | None
    hub: HubText | None
    path: str | None
    calibration_path: str | None
    field: str
    join: str

    def __post_init__(self) -> None:
        if self.path is not None and self.path == self.calibration_path:
            raise InputError(
                f"corpus {self.name}: path and calibration_path are both {self.path};"
                " calibration and evaluation need two texts"
            )

    def origin(self, purpose: Purpose) -> Path | PackageFile | HubText:
        """Where the text for `purpose` lies; InputError if this corpus has none for it."""
        own = self.calibration_path if purpose == "calibration" else self.path
        if own is not None:
            return Path(own).expanduser()
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


def read_documents(path: Path, field: str) -> list[str]:
    """The documents of a file: column `field` of jsonl(.gz) or parquet, or one text file whole."""
    if not path.is_file():
        raise InputError(f"text file {path} does not exist")
    if not path.name.endswith(_SUFFIXES):
        raise InputError(f"text file {path} has none of the suffixes {', '.join(_SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            return _column(path, field)
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as stream:
            if ".jsonl" not in path.suffixes:
                return [stream.read()]
            return [_text(json.loads(line), field) for line in stream if not line.isspace()]
    except (
        OSError,
        EOFError,
        ValueError,
    ) as error:  # ValueError: not UTF-8, not JSON, no such field, no parquet
        raise InputError(f"text file {path} cannot be read: {error}") from error


def _text(row: object, field: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        got = list(row) if isinstance(row, dict) else row
        raise ValueError(f"a row has no text in field {field!r}, it has {str(got)[:200]}")
    return row[field]


def _column(path: Path, field: str) -> list[str]:
    from pyarrow import parquet

    names = parquet.read_schema(path).names
    if field not in names:
        raise ValueError(f"it has no column {field!r}, it has {names}")
    return [
        _text({field: text}, field)
        for text in parquet.read_table(path, columns=[field])[field].to_pylist()
    ]


def fingerprints(documents: Sequence[str]) -> list[str]:
    """sha256 of every document of 200 characters or more."""
    long = (text.strip() for text in documents if len(text.strip()) >= _SAME_TEXT)
    return [hashlib.sha256(text.encode()).hexdigest() for text in long]


def check_disjoint(calibration: Sequence[str], evaluation: Sequence[str]) -> None:
    """Raises InputError if two texts, given by their fingerprints, have a document in common."""
    shared = set(calibration) & set(evaluation)
    if shared:
        raise InputError(
            f"{len(shared)} documents are in the calibration and in the evaluation text; choose"
            " another calibration.corpus or other files"
        )


def tokenise(documents: Sequence[str], join: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids [N] int64 of the documents joined to one text.

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
    """The first `count` non-overlapping windows [count, length] after `skip` tokens.

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
    own = length - len(first)
    needed = skip + count * own
    if len(ids) < needed:
        raise InputError(
            f"{name} has {len(ids)} tokens, {count} windows of {own} tokens"
            f"{f' after {skip}' if skip else ''} need {needed}; give a longer text or fewer windows"
        )
    found = ids[skip:needed].reshape(count, own)
    return torch.cat([found.new_tensor(first).expand(count, -1), found], 1)
