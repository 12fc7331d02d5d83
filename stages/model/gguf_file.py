"""What a GGUF file says and transformers does not read: how text is split, and further tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError
from stages.model.tokenizers import difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
# Names of `tokenizer.ggml.pre`, as llama.cpp reads them: GPT-2's words, with every digit alone in
# front of that, and without. transformers knows names of other patterns.
_DIGITS = ("codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder")
_WORDS = ("gpt-2", "jais", "mpt", "olmo", "phi-2")
_DEFAULT = "default"
# Of these a word that is a token stays whole, also where no merges lead to it.
_WHOLE = {"falcon-h1", "falcon3", "jina-v5-nano", "lfm2", "llama-bpe", "llama-v3", "llama3"}
_WHOLE |= {"midm-2.0", "pixtral", "tekken"}
_COMPOSED = {"qwen2", "qwen35"}  # letters and their accents are one character, as in Qwen's own


def read_tokenizer(gguf: Path, metadata: Mapping[str, Any], source: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a file, which splits text as `tokenizer.ggml.pre` of the file names it.

    Raises InputError for a name that is not known here: other ids would be made of the same text.
    """
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if metadata.get("tokenizer.ggml.model") != "gpt2":  # SentencePiece splits no text
        return tokenizer
    name = str(metadata.get("tokenizer.ggml.pre", _DEFAULT))
    backend = tokenizer.backend_tokenizer
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    elif name in _WORDS:
        backend.pre_tokenizer = words
    elif name == _DEFAULT:
        log.warning(
            "%s: its tokenizer.ggml.pre is %r, which converters write for a tokenizer that they do "
            "not know; text is split by llama.cpp's patterns for it, the original's may differ",
            *(source, name),
        )
        backend.pre_tokenizer = _default()
    elif name not in GGUF_PRE_TOKENIZER_SPLITS:
        known = sorted({*_DIGITS, *_WORDS, _DEFAULT, *GGUF_PRE_TOKENIZER_SPLITS})
        raise InputError(
            f"{source}: its tokenizer.ggml.pre is {name!r}, and how that splits text is not known "
            f"here (known: {', '.join(known)}); give the original model by model.path=FOLDER"
        )
    if name in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.model.ignore_merges = name in _WHOLE
    return tokenizer


def save_tokenizer(tokenizer: Any, metadata: Mapping[str, Any], out: Path, source: str) -> None:
    """Save a tokenizer that was read from a file, so that transformers reads this one from the folder.

    By the class that a family has it would make the splits of the family, and its classes add tokens
    that the file lacks. Raises InputError where the family's own is read all the same.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(out)
    config = _change(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    added = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    rows = metadata["tokenizer.ggml.tokens"]  # their number
    surplus = {token["content"] for token in added if token["id"] >= rows}
    there = [token for token in added if token["id"] < rows]
    _change(out / "tokenizer.json", added_tokens=there)
    named = {key: None for key, token in config.items() if token in surplus}
    _change(out / "tokenizer_config.json", **named)
    again = AutoTokenizer.from_pretrained(out, local_files_only=True, trust_remote_code=False)
    if other := difference(again, out / "tokenizer.json"):
        raise InputError(f"{source}: {other}; give the original model by model.path=FOLDER")


def _change(file: Path, **fields: Any) -> dict[str, Any]:
    """Replace fields of a json file, and return all."""
    whole: dict[str, Any] = json.loads(file.read_text()) | fields
    file.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return whole


def _default() -> Any:
    """llama.cpp's patterns for files that name none, each applied to the pieces of the one before."""
    from tokenizers import Regex, pre_tokenizers

    patterns = (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    )
    splits: list[Any] = [pre_tokenizers.Split(Regex(each), "isolated") for each in patterns]
    unsplit = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, unsplit])


def check_read(
    model: PreTrainedModel, architecture: str, names: Sequence[str], source: str
) -> None:
    """Raise InputError if a tensor of the file is none that transformers gives to the model."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    read = get_gguf_hf_weights_map(model, processor)
    read |= {
        f"{name}.weight": name for name in read
    }  # experts, which it looks up without the ending
    if surplus := sorted(set(names) - read.keys()):
        raise InputError(
            f"{source}: transformers leaves {len(surplus)} of its tensors out, the first is "
            f"{surplus[0]}; give the original model by model.path=FOLDER"
        )
