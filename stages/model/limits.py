"""What a model can read, from its config alone: how many positions, and which tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def positions(config: PreTrainedConfig) -> int | None:
    """Count the tokens a text may have: the rows of a learned position table, or as many as the rotary
    embedding was made for, with the factor of its scaling; None where its config sets no limit.

    `rope_type: dynamic` sets none: it rescales itself to the length of the text.
    """
    text: Any = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    ropes = _ropes(text)
    if most is None or any("dynamic" in str(rope.get("rope_type")) for rope in ropes):
        return None
    scaled = [
        (rope.get("original_max_position_embeddings") or most) * rope["factor"]
        for rope in ropes
        if rope.get("factor")
    ]
    return int(max(most, *scaled, 0))


def learned(config: PreTrainedConfig) -> bool:
    """Return whether positions are rows of a table, behind whose end there is nothing to read."""
    return not _ropes(config.get_text_config())


def _ropes(text: Any) -> list[Mapping[str, Any]]:
    """The parameters of every rotary embedding: one, or one a kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [each for each in rope.values() if isinstance(each, Mapping)]
    return nested or ([rope] if rope else [])


def check_positions(
    config: PreTrainedConfig,
    needed: Mapping[str, int],
    name: str | None,
    allowed: int | None = None,
    prefix: int = 0,
) -> None:
    """Raise InputError where a text, by the option that gives its length, has too many tokens.

    `allowed` replaces what a rotary embedding was made for; a table has the rows it has. `prefix`
    tokens stand in front of every text.
    """
    most, table = positions(config), learned(config)
    if allowed is not None:
        most = min(allowed, most) if table and most is not None else allowed
    for option, length in needed.items():
        if most is not None and length + prefix > most:
            behind = f" behind a prefix of {prefix}" if prefix else ""
            beyond = f", or model.positions={length + prefix} to go beyond what it was made for"
            raise InputError(
                f"{option}={length}{behind}: {name} has {most} positions; give {most - prefix} tokens "
                f"at most{'' if table else beyond}"
            )


def check_window(config: PreTrainedConfig, length: int, name: str, prefix: int = 0) -> None:
    """Raise InputError where a window of `length` tokens behind a prefix has more than a model reads."""
    most = positions(config)
    if most is None or length + prefix <= most:
        return
    behind = f" behind a prefix of {prefix}" if prefix else ""
    beyond = (
        ""
        if learned(config)
        else f", or set model.config.max_position_embeddings={length + prefix} to go beyond what it was "
        "made for"
    )
    raise InputError(
        f"a window of {length} tokens{behind}: {name} has {most} positions; give windows of "
        f"{most - prefix} tokens at most{beyond}"
    )


def vocabulary(config: PreTrainedConfig) -> int:
    """Return the number of rows of a model's embedding."""
    text: Any = config.get_text_config()
    return int(text.vocab_size)


def check_tokens(ids: Any, rows: int, what: str, tokenizer: Any = None) -> None:
    """Raise InputError for a token among ids (a tensor or list) that an embedding of `rows` lacks.

    Without a tokenizer it is called by its number alone.
    """
    highest = max(ids, default=0) if isinstance(ids, list) else int(ids.max()) if ids.numel() else 0
    if highest >= rows:
        token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(highest)!r})"
        raise InputError(
            f"{what} has the token {highest}{token}, and the model's embedding {rows} rows: its "
            "tokenizer belongs to another model, or the embedding was not resized to it"
        )
