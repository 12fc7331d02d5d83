"""Small tokenizers of every family, trained on a few lines, and texts that are hard to cut."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as splitting
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "spike", "neuron's", "of", "a", "Größe", "weights", "2024", "and", "naïve", "東京"]
WORDS += ["語", "don't", "WE'LL", "привет", "x1", "3.14", "(see)", "…"]
LETTERS = "aeb "
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>"]
MARK = "▁"  # what SentencePiece writes for a blank
PREPENDED = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])


def text(seed: int, length: int) -> str:
    """Words, and among them what is hard to cut: runs of one letter, digits, blanks and empty lines,
    combining and joined characters, special tokens."""
    draw = random.Random(seed)
    parts: list[str] = []
    while sum(map(len, parts)) < length:
        run = draw.choice((1, 2, 3, 7, 16, 40, 150))
        parts += draw.choices(
            (
                " ".join(draw.choices(WORDS, k=run)),
                draw.choice("aAeé東\u0301.-=") * run,
                "".join(draw.choices("0123456789", k=run)),
                draw.choice(" \t\n\u3000\u00a0") * run,
                "".join(draw.choices(" \n\t\r", k=run)),
                "".join(draw.choices(LETTERS, k=run)),
                draw.choice(("👩‍👩‍👧", "e\u0301\u0323", "🇩🇪", "ﬁ", "\u200d", "نص"))
                * draw.randint(1, 9),
                draw.choice(("<s>", "</s>", "<", "s>", " </s> ")),
            ),
            weights=(8, 1, 1, 1, 1, 1, 1, 1),
        )
        parts.append(draw.choice((" ", " ", "\n", "\n\n", "")))
    return "".join(parts)[:length]


def _trained(model: Any, trainer: type, normalizer: Any, splitter: Any, **more: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    lines = [line for seed in range(60) for line in text(seed, 300).splitlines()]
    chosen = trainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False, **more)
    tokenizer.train_from_iterator(lines, chosen)
    return tokenizer


def _bytes(splitter: Any) -> Tokenizer:
    return _trained(
        models.BPE(),
        trainers.BpeTrainer,
        None,
        splitter,
        initial_alphabet=splitting.ByteLevel.alphabet(),
    )


def _one_word(normalizer: Any, splitter: Any) -> Tokenizer:
    """Byte-pair encoding of the whole text as one word; what it has no letter for is bytes."""
    made = _trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, normalizer, splitter)
    settings = json.loads(made.to_str())
    model = settings["model"]
    for byte in range(256):
        model["vocab"].setdefault(f"<0x{byte:02X}>", len(model["vocab"]))
    model |= {"byte_fallback": True, "fuse_unk": True}
    return Tokenizer.from_str(json.dumps(settings))


def _framed(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """With special tokens in front and at the end."""
    numbers = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=numbers
    )
    return tokenizer


def _unigram() -> Tokenizer:
    return _trained(
        models.Unigram(),
        trainers.UnigramTrainer,
        normalizers.NFKC(),
        splitting.Metaspace(),
        unk_token="<unk>",
    )


def _wordpiece() -> Tokenizer:
    return _trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        normalizers.BertNormalizer(),
        splitting.BertPreTokenizer(),
    )


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: _bytes(splitting.ByteLevel(add_prefix_space=False)),
    "llama3": lambda: _framed(
        _bytes(
            splitting.Sequence(
                [
                    splitting.Split(Regex(LLAMA3), "isolated"),
                    splitting.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        ),
        "<s> $A",
    ),
    "smollm": lambda: _bytes(
        splitting.Sequence(
            [
                splitting.Digits(individual_digits=True),
                splitting.ByteLevel(add_prefix_space=False),
            ]
        )
    ),
    "llama2": lambda: _framed(_one_word(PREPENDED, None), "<s> $A"),
    "metaspace": lambda: _one_word(None, splitting.Metaspace(prepend_scheme="first", split=False)),
    "gemma": lambda: _one_word(
        normalizers.Replace(" ", MARK), splitting.Split(" ", "merged_with_previous")
    ),
    "one word of bytes": lambda: _bytes(
        splitting.ByteLevel(add_prefix_space=True, use_regex=False)
    ),
    "unigram": lambda: _framed(_unigram(), "$A </s>"),
    "wordpiece": lambda: _framed(_wordpiece(), "<s> $A </s>"),
}


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[kind]())


def at_once(kind: str, parts: Sequence[str]) -> list[int]:
    """The ids of the whole text, as transformers has them."""
    ids: list[int] = tokenizer(kind)("".join(parts), verbose=False)["input_ids"]
    return ids
