"""Token ids of a text of any length, a piece of it at a time: those of the whole text at once.

Neighbouring pieces overlap. Where both have the same tokens for a stretch of the overlap, the ids of one
end and those of the other begin:

- between two words of the pre-tokenizer. How it splits depends on the text ahead as far as the word or
  the blanks go on, and every word is tokenised by itself;
- anywhere with byte-pair encoding that takes the whole text for one word, as Llama-2's. A sequence of its
  tokens is the encoding of their text if and only if every two neighbours are (a merge across a boundary
  would have happened between the two alone, in the same order).

Where the overlap has no such place, as in a long run of one letter, both pieces become one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stages.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Ids = NDArray[np.int32]
_LONG = 1 << 24  # characters: one piece of so many is worth a line in the log


@dataclass(frozen=True)
class Pieces:
    """`size` characters a piece beside an `overlap` with the one before, in which `run` words (or
    tokens) on both sides of a cut must be the same. `together` are encoded at once."""

    size: int = 1 << 18
    overlap: int = 1 << 12
    run: int = 8
    together: int = 4


def tokenise(documents: Iterable[str], join: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Turn documents, joined to one text, into token ids [N] int64.

    A begin-of-sequence token is there only if the tokenizer adds one by itself, then once.
    """
    import torch

    parts = (part for text in documents for part in (join, text))
    next(parts, None)
    return torch.from_numpy(np.concatenate(list(token_ids(parts, tokenizer)))).long()


def token_ids(
    parts: Iterable[str], tokenizer: PreTrainedTokenizerBase, pieces: Pieces = Pieces()
) -> Iterator[Ids]:
    """Yield the ids of a text, given in parts, as they become known.

    Together they are `tokenizer(text)["input_ids"]`, with the tokens that it puts in front and at the end.
    Parts are read no further than the ids that are asked for need.
    """
    if not tokenizer.is_fast:
        yield _at_once(parts, tokenizer)
        return
    first, last = _added(tokenizer)
    yield first
    yield from _stitched(_Reader(parts), _Encoder(tokenizer), pieces)
    yield last


def _at_once(parts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Ids:
    text = "".join(parts)
    if len(text) > _LONG:
        log.warning(
            "%s has no offsets: all %d million characters are tokenised at once, in memory",
            type(tokenizer).__name__,
            len(text) // 10**6,
        )
    return np.array(tokenizer(text, verbose=False)["input_ids"], np.int32)


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Ids]:
    """The special tokens that the tokenizer puts in front of a text, and at its end."""
    letter = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, special = np.array(letter["input_ids"], np.int32), letter["special_tokens_mask"]
    front = special.index(0)
    return ids[:front], ids[len(special) - special[::-1].index(0) :]


def _stitched(reader: _Reader, encode: _Encoder, pieces: Pieces) -> Iterator[Ids]:
    text = reader.read(pieces.size)
    (left,), begin, least, tried = encode([text]), 0, 0, True
    for shared, more, right in _following(reader, encode, pieces, text):
        shift = len(text) - len(shared)
        cut = _cut(left, right, shift, shared, pieces.run, encode.whole) if tried else None
        if cut is None:
            text += more
            # Encoded again once it is twice as long, so that a text without a cut takes no quadratic time.
            if tried := len(text) >= least:
                left, least = _longer(text, left, begin, encode), 2 * len(text)
            continue
        end, start = cut
        yield left.ids[begin:end]
        text, left, begin, least = shared + more, right, start, 0
    yield (left if tried else _longer(text, left, begin, encode)).ids[begin:]


def _following(
    reader: _Reader, encode: _Encoder, pieces: Pieces, text: str
) -> Iterator[tuple[str, str, _Encoded]]:
    """The pieces behind `text`: what each shares with the one before, what is new, and both encoded.

    Twice as many at once each time, on all processors, so that few are read where few are needed.
    """
    count, shared = 1, text[-pieces.overlap :]
    while True:
        batch = []
        for more in iter(lambda: reader.read(pieces.size), ""):
            batch.append((shared, more))
            shared = (shared + more)[-pieces.overlap :]
            if len(batch) == count:
                break
        if not batch:
            return
        encoded = encode([before + more for before, more in batch])
        yield from ((*texts, each) for texts, each in zip(batch, encoded, strict=True))
        count = min(2 * count, pieces.together)


def _longer(text: str, before: _Encoded, begin: int, encode: _Encoder) -> _Encoded:
    """A piece that has become longer; the ids in front of its token `begin` have been given away."""
    (after,) = encode([text])
    if begin and after.head(begin + 1) != before.head(begin + 1):
        raise InputError(
            f"the text behind {text[:40]!r} has other tokens the further it is read, and cannot be "
            "tokenised in pieces; leave this part out"
        )
    if len(text) > _LONG:
        log.warning(
            "%d million characters have no place to cut at and are tokenised at once, in memory",
            len(text) // 10**6,
        )
    return after


def _cut(
    left: _Encoded, right: _Encoded, shift: int, shared: str, run: int, whole: bool
) -> tuple[int, int] | None:
    """The token of `left`, and that of `right`, from which on the ids are those of `right`.

    `shared` is the text of the overlap, `shift` where in the left piece it begins. `whole`: the text is
    one word. None where no cut has enough of the same around it.
    """
    low, a = left.tail(shift)
    b = right.within(len(shared), shift)
    i = 0
    while i < len(a):
        j = int(np.searchsorted(b[:, 1], a[i, 1]))
        same = (a[i : i + len(b) - j] == b[j : j + len(a) - i]).all(1)
        length = len(same) if same.all() else int(same.argmin())
        places = np.arange(length) if whole else np.flatnonzero(a[i : i + length, 3])
        if len(places) > 2 * run:
            place = int(places[len(places) // 2])
            # Blanks alone on the right may belong to one word with those behind the piece.
            if shared[a[i + place, 1] - shift : a[i + length - 1, 2] - shift].strip():
                return low + i + place, j + place
        i = max(i + length, int(np.searchsorted(a[:, 1], a[i, 1], "right")))
    return None


class _Reader:
    """A text in parts, read by numbers of characters."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._parts, self._part, self._at = iter(parts), "", 0

    def read(self, count: int) -> str:
        """The next `count` characters, fewer at the end of the text."""
        taken = []
        while count:
            if self._at == len(self._part):
                self._part, self._at = next((part for part in self._parts if part), ""), 0
                if not self._part:
                    break
            taken.append(self._part[self._at : self._at + count])
            self._at += len(taken[-1])
            count -= len(taken[-1])
        return "".join(taken)


@dataclass(frozen=True)
class _Encoded:
    """The ids of a piece; its tokens are rows [id, first character, the one behind its last, whether it
    begins a word]."""

    ids: Ids
    encoding: Any  # tokenizers.Encoding

    def head(self, count: int) -> list[tuple[int, ...]]:
        """The first tokens."""
        return [self._row(i) for i in range(min(count, len(self.ids)))]

    def within(self, characters: int, shift: int) -> NDArray[np.int64]:
        """The tokens that end within the first characters, moved by `shift`."""
        return _array(takewhile(lambda row: row[2] <= characters, map(self._row, self._all)), shift)

    def tail(self, first: int) -> tuple[int, NDArray[np.int64]]:
        """The tokens that begin at character `first` or behind it, and the number of those before."""
        rows = list(takewhile(lambda row: row[1] >= first, map(self._row, reversed(self._all))))
        return len(self.ids) - len(rows), _array(reversed(rows), 0)

    @property
    def _all(self) -> range:
        return range(len(self.ids))

    def _row(self, index: int) -> tuple[int, ...]:
        word, before = (self.encoding.token_to_word(i) for i in (index, max(index - 1, 0)))
        begins = index == 0 or word is None or word != before
        return (int(self.ids[index]), *self.encoding.token_to_chars(index), int(begins))


def _array(rows: Iterable[tuple[int, ...]], shift: int) -> NDArray[np.int64]:
    return np.array(list(rows), np.int64).reshape(-1, 4) + np.array([0, shift, shift, 0])


class _Encoder:
    """Encodes pieces of a text without special tokens; `whole`: by pairs, as one word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend: Any = tokenizer
        settings = json.loads(backend.backend_tokenizer.to_str())
        self.whole = settings["model"]["type"] == "BPE" and _one_word(settings["pre_tokenizer"])

    def __call__(self, texts: Sequence[str]) -> list[_Encoded]:
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)
        every = zip(encoded["input_ids"], encoded.encodings or (), strict=True)
        return [_Encoded(np.array(ids, np.int32), encoding) for ids, encoding in every]


def _one_word(splitting: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer never splits, or at single characters whatever stands around them."""
    if splitting is None:
        return True
    match splitting["type"]:
        case "Sequence":
            return all(map(_one_word, splitting["pretokenizers"]))
        case "Metaspace":
            return not splitting["split"]
        case "ByteLevel":
            return not splitting["use_regex"]
        case "Split":
            return len(splitting["pattern"].get("String", "  ")) == 1
    return False
