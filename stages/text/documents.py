"""Documents of local texts, read a piece at a time: of a file, or a folder of shards, in their order."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from stages.errors import InputError

ROWS = ("document", "lines", "sentences")  # what a plain text file is read as
PLAIN = (".txt", ".text", ".raw", ".tokens")
JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
PARQUET = (".parquet",)
CSV = (".csv",)
_KINDS = (PLAIN, JSON, PARQUET, CSV)
_ENCODING = "utf-8-sig"  # UTF-8, without the mark that some editors put in front
_BLOCK = 1 << 26  # bytes of csv at once, which a row must fit in
_ROWS = 1024  # of parquet at once
_CHARACTERS = 1 << 20  # of plain text or of a JSON array at once
_BLANK, _COMMA, _CLOSED = (re.compile(rf"\s*{mark}\s*") for mark in ("", ",", r"\]"))
_SHARD = re.compile(r"[-._]\d+-of-\d+\b.*")
_DAMAGED = (OSError, EOFError, ValueError, zlib.error)  # ValueError: not UTF-8, JSON, csv, parquet


class Piece(NamedTuple):
    """A document, or the next part of one; `text` is None for a row whose text is null."""

    text: str | None
    more: bool = False  # the document goes on in the next piece


def check_head(path: Path, field: str, rows: str) -> None:
    """Raise InputError if a text cannot be read up to its first word, or has none."""
    if not any(piece.text for piece in read_pieces(path, field, rows)):
        raise InputError(f"text {path} is empty: it has no row with a text in it")


def read_pieces(path: Path, field: str, rows: str = "document") -> Iterator[Piece]:
    """Yield the documents of a text one after the other; InputError where one cannot be read.

    `field` is the column of JSON lines, a JSON array, parquet or csv. A plain text file is one
    `document`, in pieces of a million characters, or has one a line: `lines` end with their newline and
    blank ones are empty, as in WikiText's data sets; `sentences` have no blanks around them, as in PTB's.
    """
    for file in shards(path):
        try:
            if rows == "document" and _kind(file) is PLAIN:
                yield from _whole(file)
            else:
                yield from map(Piece, _file(file, field, rows))
        except _DAMAGED as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"text file {file} cannot be read: {reason}") from error


def shards(path: Path) -> list[Path]:
    """Return the files of a text in their order: itself, or those of a folder, by name and of one kind."""
    if path.is_file():
        _kind(path)
        return [path]
    if not path.is_dir():
        raise InputError(f"text file {path} does not exist")
    files = sorted(file for file in path.iterdir() if file.is_file() and _suffix(file))
    kinds = list(dict.fromkeys(_kind(file) for file in files))
    splits = sorted({_SHARD.sub("", file.name) for file in files if _SHARD.search(file.name)})
    if not files:
        raise InputError(f"text folder {path} has no file with one of the suffixes {_all()}")
    several = ", ".join(splits) if len(splits) > 1 else None
    if len(kinds) > 1:
        several = ", ".join(next(f.name for f in files if _kind(f) == kind) for kind in kinds)
    if several:
        raise InputError(
            f"text folder {path} has more than one text ({several}); give one file, or a folder with "
            "the shards of one text alone"
        )
    return files


def plain(path: Path) -> bool:
    """Return whether a text is a plain file, or a folder of such, rather than a table."""
    return _kind(shards(path)[0]) is PLAIN


def _suffix(path: Path) -> str | None:
    every = (suffix for kind in _KINDS for suffix in kind)
    return next((suffix for suffix in every if path.name.lower().endswith(suffix)), None)


def _all() -> str:
    return ", ".join(suffix for kind in _KINDS for suffix in kind)


def _kind(path: Path) -> tuple[str, ...]:
    suffix = _suffix(path)
    if suffix is None:
        raise InputError(f"text file {path} has none of the suffixes {_all()}")
    return next(kind for kind in _KINDS if suffix in kind)


def _file(path: Path, field: str, rows: str) -> Iterator[str | None]:
    kind = _kind(path)
    if kind is PARQUET:
        return _parquet(path, field)
    return _csv(path, field) if kind is CSV else _stream(path, field, rows)


def _opened(path: Path) -> IO[str]:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    stream: IO[str] = opener(path, "rt", encoding=_ENCODING)
    return stream


def _whole(path: Path) -> Iterator[Piece]:
    with _opened(path) as stream:
        block = stream.read(_CHARACTERS)
        while following := stream.read(_CHARACTERS):
            yield Piece(block, more=True)
            block = following
        yield Piece(block)


def _stream(path: Path, field: str, rows: str) -> Iterator[str | None]:
    with _opened(path) as stream:
        if _kind(path) is JSON:
            yield from _json(stream, field, array=".jsonl" not in path.name.lower())
        elif rows == "lines":
            yield from (line if line.strip() else "" for line in stream)
        else:
            yield from (line.strip() for line in stream)


def _json(stream: IO[str], field: str, array: bool) -> Iterator[str | None]:
    """Rows of JSON lines; of one array, where the file may be one and begins so."""
    if array and _first(stream) == "[":
        for number, row in enumerate(_array(stream), start=1):
            yield _text(row, field, f"row {number}")
        return
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON ({error})") from error
        yield _text(row, field, f"line {number}")


def _first(stream: IO[str]) -> str:
    """The first character that is no blank; the stream is at its beginning again."""
    while (character := stream.read(1)).isspace():
        pass
    stream.seek(0)
    return character


def _array(stream: IO[str]) -> Iterator[Any]:
    """The rows of a JSON array, each decoded once enough of the file has been read."""
    while stream.read(1) != "[":
        pass
    decode, between, text, at = json.JSONDecoder().raw_decode, _BLANK, "", 0
    while True:
        try:
            if (gap := between.match(text, at)) is None:
                raise ValueError(f"no comma and no end of the array at {text[at : at + 40]!r}")
            row, end = decode(text, gap.end())
        except ValueError:
            if closed := _CLOSED.match(text, at):
                if (text[closed.end() :] + stream.read()).strip():
                    raise ValueError("something stands behind the end of the array") from None
                return
            if not (block := stream.read(max(_CHARACTERS, len(text)))):
                raise
            text, at = text[at:] + block, 0
            continue
        yield row
        at, between = end, _COMMA


def _text(row: object, field: str, where: str) -> str | None:
    if isinstance(row, dict) and field in row and isinstance(row[field], str | None):
        text: str | None = row[field]
        return text
    got = row
    if isinstance(row, dict):
        got = repr(row[field]) if field in row else f"the fields {', '.join(map(str, row))}"
    raise ValueError(f"{where} has no text in field {field!r}, it has {str(got)[:200]}")


def _parquet(path: Path, field: str) -> Iterator[str | None]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _check_column(file.schema_arrow.names, field)
        number = 0
        for batch in file.iter_batches(_ROWS, columns=[field]):
            for text in batch[field].to_pylist():
                number += 1
                yield _text({field: text}, field, f"row {number}")


def _csv(path: Path, field: str) -> Iterator[str | None]:
    """Rows of a csv file with a header; an empty cell is an empty text, and nothing stands for null.

    pandas would cut rows with more cells than the header has, without a word.
    """
    import pyarrow as pa
    from pyarrow import csv

    with csv.open_csv(
        path,
        csv.ReadOptions(block_size=_BLOCK),
        csv.ParseOptions(newlines_in_values=True),
        csv.ConvertOptions(column_types={field: pa.string()}),
    ) as reader:
        _check_column(reader.schema.names, field)
        for batch in reader:
            yield from batch[field].to_pylist()


def _check_column(names: Any, field: str) -> None:
    if field not in list(names):
        raise ValueError(f"it has no column {field!r}, it has {', '.join(map(str, names))}")
