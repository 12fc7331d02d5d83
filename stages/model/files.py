"""What the files of a checkpoint hold, by their headers, and whether it is what the model takes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
NUMBERS = ("F64", "F32", "F16", "BF16")  # what a weight without a scale is stored as
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `dtype` as safetensors spells it: F32, F8_E4M3, I8."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model by their names in its files; those of `scaled` are codes and scales that
    a quantiser multiplies. `source` is what a user calls it."""

    source: str
    tensors: Mapping[str, Stored]
    scaled: frozenset[str] = frozenset()


def stored(folder: Path, config: Any) -> dict[str, Stored]:
    """List every tensor of the file or the shards that transformers reads in a folder.

    Raises InputError where the files and their index disagree.
    """
    name = getattr(config, "transformers_weights", None)
    name = name or next((n for n in (_WHOLE, _INDEX) if (folder / n).is_file()), None)
    if name is None:
        there = sorted(folder.glob("*.safetensors"))[0].name
        raise InputError(f"model folder {folder} has {there}, but no {_WHOLE} and no {_INDEX}")
    if not name.endswith(".index.json"):
        return _headers(folder / name)
    shards = json.loads((folder / name).read_text())
    shards = shards.get("weight_map") if isinstance(shards, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"model folder {folder}: its {name} names no tensors")
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise InputError(f"model folder {folder} lacks {shard}, which its index names")
        here = _headers(folder / shard)
        if twice := sorted(tensors.keys() & here):
            raise InputError(
                f"model folder {folder}: {twice[0]} is in {tensors[twice[0]].file.name} and in {shard}"
            )
        tensors |= here
    _agree(folder, shards, tensors)
    return tensors


def _headers(file: Path) -> dict[str, Stored]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118, no mapping
        return {k: Stored(file, p.get_dtype(), tuple(p.get_shape())) for k, p in parts.items()}


def _agree(folder: Path, shards: Mapping[str, str], tensors: Mapping[str, Stored]) -> None:
    """Raise InputError unless every tensor is in the shard that the index gives for it."""
    for name in sorted(shards):
        if name not in tensors or tensors[name].file.name != Path(shards[name]).name:
            raise InputError(
                f"model folder {folder}: its index names {name} in {shards[name]}, which lacks it"
            )
    if more := sorted(tensors.keys() - shards):
        raise InputError(
            f"model folder {folder}: its shards hold {len(more)} weights that its index does not "
            f"name, the first is {more[0]}"
        )


def check_fit(
    model: PreTrainedModel, checkpoint: Checkpoint, report: Mapping[str, Iterable[Any]]
) -> None:
    """Raise InputError unless the files hold exactly the weights that the model has.

    `report` is what transformers says of missing_keys, unexpected_keys and mismatched_keys (name,
    shape in the file, shape in the model).
    """
    source, tensors = checkpoint.source, checkpoint.tensors
    odd = {name for name, tensor in tensors.items() if tensor.dtype not in NUMBERS}
    if codes := _counted(model, odd - checkpoint.scaled):
        raise InputError(
            f"model {source}: {len(codes)} weights are {tensors[codes[0]].dtype}, the first is "
            f"{codes[0]}: codes that no quantization_config of its config.json explains; give the "
            "dequantised model, as save_pretrained writes it, by model.path=FOLDER"
        )
    if absent := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        raise InputError(
            f"model {source}: its files lack {len(absent)} weights, the first is {absent[0]}"
        )
    if wrong := sorted(report["mismatched_keys"]):
        name, here, wanted = wrong[0]
        raise InputError(
            f"model {source}: {len(wrong)} weights do not fit its config, the first is {name}: "
            f"{list(here)} in its files, {list(wanted)} by its config"
        )
    if surplus := _counted(model, set(report["unexpected_keys"])):
        raise InputError(
            f"model {source}: its files hold {len(surplus)} weights that a {type(model).__name__} of "
            f"its config has no place for, the first is {surplus[0]}"
        )


def _counted(model: PreTrainedModel, names: set[str]) -> list[str]:
    """Of names in files, those that transformers does not ignore by design, as old RoPE buffers."""
    from transformers.utils.loading_report import LoadStateDictInfo

    info = LoadStateDictInfo(set(), names, set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    return sorted(info.unexpected_keys)


def keep_apart(model: PreTrainedModel, source: str, pairs: Mapping[str, str]) -> None:
    """Warn of, and record, weights which the config ties but are two in the files: {one: the other}.

    transformers computes with both then. With the config as it was, a model that is saved, or that
    is tied once more, would have one of them.
    """
    for one, other in pairs.items():
        log.warning(
            "model %s: its config.json ties %s to %s, but its files hold two different tensors; the "
            "model has both, as in transformers",
            *(source, one, other),
        )
        model.all_tied_weights_keys.pop(one, None)
        model.config.get_text_config(decoder=True).tie_word_embeddings = False
        model.config.tie_word_embeddings = False


@contextmanager
def unreported() -> Iterator[None]:
    """Silence what transformers says of weights that do not fit, of ties, which are both said here, and of
    MXFP4, which it calls bfloat16 though it makes the dtype that is asked for."""
    names = ("transformers.modeling_utils", "transformers.quantizers.quantizer_mxfp4")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
