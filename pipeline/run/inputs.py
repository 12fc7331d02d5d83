"""What enters the six stages, as artifacts: the model, the texts as tokens, the questions."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.run.assets import asset_step, content, fetch, fetch_all
from pipeline.run.fingerprint import digest, folder_fingerprint
from pipeline.store.provenance import libraries
from pipeline.store.step import Step, code_hash
from pipeline.store.store import Artifact, Store
from stages.errors import InputError
from stages.model.loading import ATTENTION, convert_gguf, load, load_offloaded, load_tokenizer
from stages.model.offload import Offload
from stages.model.sources import HubText, PackageFile
from stages.model.spec import ModelSpec
from stages.text.corpus import Corpus, Purpose, check_disjoint, fingerprints, present, tokenise
from stages.text.documents import read_documents, shards
from stages.text.harness import TaskSpec
from stages.transforms.transform import Transform, Untouched

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "prefix.json"  # what the search for a prefix found


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded, and what identifies it: `key` enters every artifact made with it.

    `weights` is the key without the transform, for what depends on the tokenizer alone, and
    `fingerprint` that of its files in whatever dtype. Nothing is fetched before the model is loaded.
    """

    spec: ModelSpec
    key: str
    weights: str
    fingerprint: str
    store: Store
    device: str
    offload: Offload | None = None
    transform: Transform = Untouched()
    prefix: Step | None = None

    @property
    def source(self) -> str:
        """Its folder or its name on the hub; a package's file is fetched and dequantised once."""
        if self.spec.path is not None:
            return str(Path(self.spec.path).expanduser())
        if self.spec.gguf is None:
            return str(self.spec.hub)
        file, store = self.spec.gguf, self.store
        made = store.build(
            model_step(file), lambda out: convert_gguf(content(fetch(file, store)), out)
        )
        return str(made.path)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and tokenizer; one model at a time stays in memory."""
        spec, source = self.spec, self.source
        revision = self._revision(source)
        origin = _Origin(source, spec.dtype, self.device, revision, spec.device_map, self.offload)
        chosen: Any = self.transform  # a frozen dataclass, but a protocol cannot promise a hash
        model, tokenizer = _loaded(self.key, origin, chosen, self._prefix())
        spec.check_begin(model.get_input_embeddings().num_embeddings)
        return model, tokenizer

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone, before hours are spent on what its tokens may not suffice for."""
        source = self.source
        return load_tokenizer(source, self._revision(source))

    def _revision(self, source: str) -> str | None:
        return None if Path(source).is_dir() else self.spec.revision

    def transformed(self, transform: Transform, prefix: Step | None = None) -> ModelSource:
        """The same model behind a transform, whose prefix is what the step `prefix` finds."""
        if isinstance(transform, Untouched):
            return self
        keys = {"model": self.key} | ({} if prefix is None else {"prefix": prefix.key()})
        key = Step("transform", transform, keys, ("stages.transforms.transform",)).key()
        return replace(self, key=key, transform=transform, prefix=prefix)

    @property
    def plain(self) -> ModelSource:
        """The same model without its transform."""
        return replace(self, key=self.weights, transform=Untouched(), prefix=None)

    def _prefix(self) -> tuple[int, ...]:
        if self.prefix is None:
            return ()
        folder = self.store.open("prefix", self.prefix.key()).path
        return tuple(json.loads((folder / PREFIX).read_text())["ids"])


@dataclass(frozen=True)
class _Origin:
    source: str
    dtype: str
    device: str
    revision: str | None
    device_map: str | None
    offload: Offload | None


@functools.lru_cache(maxsize=1)
def _loaded(key: str, origin: _Origin, transform: Transform, prefix: tuple[int, ...]) -> Any:
    _loaded.cache_clear()  # the model before goes before this one comes
    model, tokenizer = _load(origin)
    transform.apply(model, prefix)
    return model, tokenizer


def _load(origin: _Origin) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    where: Any = {k: getattr(origin, k) for k in ("source", "dtype", "device", "revision")}
    if origin.offload is not None:  # it places every layer itself
        return load_offloaded(**where, offload=origin.offload)
    return load(**where, device_map=origin.device_map)


def forget() -> None:
    """Lets go of the model that stays in memory between runs."""
    _loaded.cache_clear()


def model_source(
    spec: ModelSpec, store: Store, device: str, offload: Offload | None = None
) -> ModelSource:
    """Finds the model a spec names: a local folder, a package's GGUF file dequantised once, the hub."""
    if spec.path is not None:
        identity: dict[str, Any] = folder_fingerprint(Path(spec.path).expanduser())
    elif spec.gguf is not None:
        identity = {"gguf": spec.gguf.sha256}
    elif spec.hub is not None:
        identity = {"hub": spec.hub, "revision": _commit(spec.hub, spec.revision)}
    else:
        raise InputError(f"model {spec.name} has no weights; give model.path=FOLDER")
    parts = identity | {"dtype": spec.dtype, "attention": ATTENTION, "rules": _rules(spec)}
    parts["libraries"] = libraries()  # in the key of every stage that runs the model
    if spec.gguf is not None:
        parts["gguf"] = model_step(spec.gguf).key()  # the code that dequantises it counts too
    key = _hashed(parts)
    return ModelSource(spec, key, key, _hashed(identity), store, device, offload)


def _hashed(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _rules(spec: ModelSpec) -> str | None:
    """The hash of the role rules of a model's family; None where there are none, which is told when
    its sites are looked for."""
    kind = spec.dims.get("model_type")
    if spec.path is not None:
        kind = _model_type(Path(spec.path).expanduser() / "config.json")
    elif spec.hub is not None:
        kind = _hub_config(spec.hub, spec.revision).model_type
    try:
        return code_hash((f"stages.model.architectures.{str(kind).replace('-', '_')}",))
    except ModuleNotFoundError:
        return None


def _model_type(config: Path) -> str | None:
    try:
        found: str | None = json.loads(config.read_text())["model_type"]
    except FileNotFoundError:  # which is told when the model is loaded
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{config} cannot be read, or names no model_type: {error}") from error
    return found


def model_step(file: PackageFile) -> Step:
    """The dequantised model of a package's GGUF file."""
    spec = {"sha256": file.sha256, "libraries": libraries()}
    return Step("model", spec, {}, ("stages.model.loading",))


def _commit(hub: str, revision: str | None) -> str:
    """The commit a hub revision stands for today, so that a moved branch is another model."""
    return str(getattr(_hub_config(hub, revision), "_commit_hash", None) or revision or "main")


@functools.cache
def _hub_config(hub: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(hub, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {hub} cannot be reached on the hub ({str(error).splitlines()[0]}); log in "
            "if it is gated, or give a local folder by model.path=FOLDER"
        ) from error


def tokens_step(corpus: Corpus, purpose: Purpose, model: ModelSource) -> Step:
    """What determines the tokens of a corpus' part; a local text is the digests of its files."""
    origin = corpus.origin(purpose)
    keys = {"model": model.weights}
    modules: tuple[str, ...] = ("stages.text.corpus",)
    spec: dict[str, Any] = {"purpose": purpose, "field": corpus.field, "join": corpus.join}
    if isinstance(origin, PackageFile):
        keys["text"] = text_step(origin).key()
    elif isinstance(origin, HubText):
        spec["hub"] = origin
        modules += ("stages.text.hub",)
    else:
        spec |= {"files": [digest(file) for file in shards(origin)], "rows": corpus.rows}
    return Step("tokens", spec, keys, modules)


def tokens(corpus: Corpus, purpose: Purpose, model: ModelSource, store: Store) -> Artifact:
    """Token ids of a corpus' part, and hashes of its documents so that overlap can be refused."""

    def make(out: Path) -> None:
        rows = _documents(corpus, purpose, store)
        texts = present(corpus.name, rows)
        _save_tokens(out, tokenise(texts, corpus.join, model.tokenizer()), texts, len(rows))

    return store.build(tokens_step(corpus, purpose, model), make)


def _documents(corpus: Corpus, purpose: Purpose, store: Store) -> list[str | None]:
    origin = corpus.origin(purpose)
    if isinstance(origin, PackageFile):
        origin = _wikipedia(origin, store).path / f"{purpose}.jsonl"
    return _hub(origin, purpose) if isinstance(origin, HubText) else _read(origin, corpus)


def _read(path: Path, corpus: Corpus) -> list[str | None]:
    return read_documents(path, corpus.field, corpus.rows)


def _hub(origin: HubText, purpose: Purpose) -> list[str | None]:
    from stages.text.hub import read_hub

    return read_hub(origin, purpose)


def text_step(file: PackageFile) -> Step:
    """The articles of a package's Wikipedia excerpt."""
    return Step("text", {"sha256": file.sha256}, {}, ("stages.text.wikipedia",))


def _wikipedia(file: PackageFile, store: Store) -> Artifact:
    from stages.text.wikipedia import extract_wikipedia

    return store.build(
        text_step(file), lambda out: extract_wikipedia(content(fetch(file, store)), out)
    )


def _save_tokens(out: Path, ids: Tensor, texts: list[str], rows: int) -> None:
    from safetensors.torch import save_file

    save_file({"ids": ids}, out / "tokens.safetensors")
    record = {"rows": rows, "null": rows - len(texts), "documents": fingerprints(texts)}
    (out / "documents.json").write_text(json.dumps(record))


def load_tokens(artifact: Artifact) -> Tensor:
    """The ids [N] of a tokens artifact."""
    from safetensors.torch import load_file

    return load_file(artifact.path / "tokens.safetensors")["ids"]


def refuse_overlap(calibration: Artifact, evaluation: Artifact) -> None:
    """Raises InputError if both texts hold the same document of 200 characters or more."""
    seen, held_out = (
        json.loads((a.path / "documents.json").read_text())["documents"]
        for a in (calibration, evaluation)
    )
    check_disjoint(seen, held_out)


def question_key(spec: TaskSpec) -> str:
    """What identifies a task's data: its package's file, a local one, or lm-eval's own on the hub."""
    if spec.path is not None:
        return digest(_question_path(spec, spec.path))
    return "hub" if spec.package is None else asset_step(spec.package).key()


def question_file(spec: TaskSpec, specs: Sequence[TaskSpec], store: Store) -> Path | None:
    """A task's data file, None for lm-eval's own data set; the packages of all `specs` are fetched."""
    if spec.path is not None:
        return _question_path(spec, spec.path)
    if spec.package is None:
        return None
    packages = [s.package for s in specs if s.path is None and s.package is not None]
    fetched = dict(zip(packages, fetch_all(packages, store), strict=True))
    return content(fetched[spec.package])


def _question_path(spec: TaskSpec, path: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise InputError(f"tasks.{spec.name}.path: {found} does not exist")
    return found
