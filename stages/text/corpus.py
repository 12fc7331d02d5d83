"""Texts to calibrate and evaluate on: where they come from, how they are put together, their windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from stages.errors import InputError
from stages.model.sources import HubText, PackageFile
from stages.text.documents import ROWS, plain

if TYPE_CHECKING:
    from torch import Tensor

Purpose = Literal["calibration", "evaluation"]
ALL: Final = "all"  # every whole window of a text


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

    def protocol(self, purpose: Purpose) -> str:
        """Say how the text for `purpose` is put together."""
        origin, documents = self.origin(purpose), "rows of a table"
        if isinstance(origin, Path) and plain(origin):
            documents = "lines" if self.rows != "document" else "files as they stand"
            documents = f"{documents} (corpus.{self.name}.rows={self.rows})"
        return f"{documents}, joined by {self.join!r}"

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


def windows(
    ids: Tensor,
    count: int | Literal["all"],
    length: int,
    skip: int = 0,
    name: str = "corpus",
    begin: int | None = None,
) -> Tensor:
    """Cut the first `count` windows [count, length] after `skip` tokens, or all whole ones; none overlap.

    With `begin` every window is that token and length - 1 tokens of the text; one that the tokenizer
    has put in front of the text is not repeated. Tokens that fill no window are left out, as GPTQ does
    (Frantar et al. 2023). Without `begin` the windows share the memory of `ids`.
    """
    import torch

    if count != ALL and count < 1 or length < 2 or skip < 0:
        raise InputError(
            f"windows: got {count} of {length} tokens after {skip};"
            " needs 1 or more, of 2 or more, after 0 or more"
        )
    ids, first = _behind(ids, begin)
    width = length - len(first)
    number = max(1, (len(ids) - skip) // width) if count == ALL else count
    needed = skip + number * width
    if len(ids) < needed:
        raise InputError(
            f"{name} has {len(ids)} tokens, {number} windows of {width} tokens"
            f"{f' after {skip}' if skip else ''} need {needed}; give a longer text or fewer windows"
        )
    texts = ids[skip:needed].reshape(number, width)
    if not first:
        return texts
    return torch.cat([texts.new_tensor(first).expand(number, -1), texts], 1)


def remainder(ids: Tensor, length: int, begin: int | None = None) -> int:
    """Count the tokens behind all windows of a text, of which there are fewer than one of them takes."""
    ids, first = _behind(ids, begin)
    return len(ids) % (length - len(first))


def _behind(ids: Tensor, begin: int | None) -> tuple[Tensor, list[int]]:
    """The ids without the token that every window begins with, and it, if any."""
    first = [] if begin is None else [begin]
    return (ids[1:] if first and ids[:1].tolist() == first else ids), first
