"""The tokenizer of a folder: whether it is that of its tokenizer.json, and its model has its tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.limits import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
_FILE = "tokenizer.json"
# Blanks, line ends, digits, case, contractions, marks, accents in both forms, other scripts.
PROBE = (
    "The  spike's\n\n 12345.6 - it'S\tWE'LL!?  café cafe\u0301 naïve Größe \ufb01n 東京2024 привет"
    "\u00a0x1\u200d 👩\u200d👧 <s>[INST] a_b(c) == {d};\r\n  end "
)
_MODEL = ',"model":{'  # the last part; in a string its quotes would be escaped
_NAMES = {
    "normalizer": "normalizer",
    "pre_tokenizer": "pre_tokenizer",
    "post_processor": "post_processor",
    "decoder": "decoder",
    "model": "vocabulary or merges",
    "added_tokens": "added tokens",
}


def read(folder: Path, source: str, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a folder as transformers does; `source` is what a user calls it.

    Warns of tokens that the model's embedding lacks, and of a tokenizer that is another than the one of
    tokenizer.json.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    say_behind(tokenizer, vocabulary(config), source)
    file = folder / _FILE
    if file.is_file() and (other := difference(tokenizer, file)):
        log.warning("model %s: %s", source, other)
    return tokenizer


def say_behind(tokenizer: PreTrainedTokenizerBase, rows: int, source: str) -> None:
    """Warn of tokens that the embedding has no row for: a text with one is refused, by its name."""
    behind = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if behind:
        first = min(behind, key=lambda token: behind[token])
        added = len(behind.keys() & tokenizer.get_added_vocab().keys())
        log.warning(
            "model %s: %d tokens of its tokenizer, %d of them added ones, are behind the %d rows of its "
            "embedding, the first is %r (%d); a text with one is refused",
            *(source, len(behind), added, rows, first, behind[first]),
        )


def difference(tokenizer: PreTrainedTokenizerBase, file: Path) -> str | None:
    """Say in which parts a tokenizer is another than the one of a tokenizer.json, None where it is that.

    Parts that make no difference to ids or to text are left out, as the offsets that ByteLevel trims.
    """
    from tokenizers import Tokenizer

    kind, backend = type(tokenizer).__name__, getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return f"transformers reads another tokenizer ({kind}) than its {_FILE}"
    there = Tokenizer.from_file(str(file))
    made, wanted = _parts(backend), _parts(there)
    if made["model"] != wanted["model"]:  # in their spelling, which is long
        made["model"], wanted["model"] = _model(made["model"]), _model(wanted["model"])
    parts = [name for key, name in _NAMES.items() if made[key] != wanted[key]]
    if not parts:
        return None
    tokenizer_ids = backend.encode(PROBE).ids
    ids = there.encode(PROBE).ids
    probe = "a probe text has the same ids with both"
    if ids != tokenizer_ids:
        at = next(
            (i for i, (a, b) in enumerate(zip(ids, tokenizer_ids, strict=False)) if a != b), -1
        )
        probe = f"a probe text has other ids (from the {at % len(ids) + 1}. on)"
    return (
        f"transformers reads another tokenizer ({kind}) than its {_FILE}, by {', '.join(parts)}; "
        f"{probe}; texts are cut by transformers' one"
    )


def _parts(tokenizer: Any) -> dict[str, Any]:
    """The parts of a tokenizer that decide on ids and text, in one form; its model as json."""
    head, _, model = tokenizer.to_str().partition(_MODEL)
    parts = json.loads(f"{head}}}")
    return {
        "normalizer": _flat(parts["normalizer"]),
        "pre_tokenizer": _flat(parts["pre_tokenizer"]),
        "post_processor": _adding(parts["post_processor"]),
        "decoder": _flat(parts["decoder"], decoder=True),
        "model": f"{_MODEL[1:]}{model}",
        "added_tokens": {token["id"]: token for token in parts["added_tokens"]},
    }


def _model(described: str) -> dict[str, Any]:
    """The vocabulary, the merges and the settings that decide on ids."""
    model: dict[str, Any] = json.loads(f"{{{described}")["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "unk_token"):
        model[name] = model.get(name) or None
    if model["unk_token"] is None:
        model.pop("fuse_unk", None)
    return model


def _flat(part: Any, decoder: bool = False) -> Any:
    """A sequence as a list of its members; None is an empty one."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        members = next(value for value in part.values() if isinstance(value, list))
        return [each for member in members for each in _flat(member, decoder)]
    if part["type"] == "ByteLevel" and decoder:
        return [{"type": "ByteLevel"}]
    return [{name: value for name, value in part.items() if name != "trim_offsets"}]


def _adding(part: Mapping[str, Any] | None) -> list[Any]:
    """What a post-processor adds to one text."""
    made: list[Any] = []
    for each in _flat(part):
        if each["type"] == "TemplateProcessing":
            ids = {name: token["ids"] for name, token in each["special_tokens"].items()}
            tokens = [piece.get("SpecialToken", {}).get("id") for piece in each["single"]]
            made += [ids.get(token) for token in tokens] if any(tokens) else []
        elif each["type"] != "ByteLevel":  # which moves offsets alone
            made.append(each)
    return made
