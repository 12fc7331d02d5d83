"""What a GGUF file says and transformers does not read: how text is split, and further tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError

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


def read_tokenizer(gguf: Path, metadata: Mapping[str, Any], source: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a file, which splits text as `tokenizer.ggml.pre` of the file names it.

    Raises InputError for a name that is not known here: other ids would be made of the same text.
    """
    from tokenizers import pre_tokenizers
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
    backend.model.ignore_merges = name in _WHOLE
    return tokenizer


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
    """Raise InputError if a tensor of the file is none that transformers gives to the model.

    It says so itself for the architectures of its newer reader; the older one is silent.
    """
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    if is_gguf_arch_supported(architecture):
        return
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
