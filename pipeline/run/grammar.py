"""Overrides as they stand on a command line: read, quoted, and written from values."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from stages.errors import InputError


def parsed(arguments: Sequence[str]) -> list[Override]:
    """The overrides among the arguments, the others being flags and what they take.

    Raises InputError for a word without `=`, Hydra's OverrideParseException for what it cannot read.
    """
    parser = OverridesParser.create()
    overrides: list[Override] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-") or (before.startswith("-") and "=" not in argument):
            continue
        if "=" not in argument and not argument.startswith("~"):
            whole = quoted(f"{before} {argument}") if before else None
            hint = f"; if it belongs to {before}, type {whole}" if whole else ""
            raise InputError(f"{argument}: options are given as KEY=VALUE{hint}")
        overrides += parser.parse_overrides([argument])
    return overrides


def quoted(argument: str) -> str | None:
    """What to type for an override whose value is to be taken as it is; None where that is no help."""
    key, equals, value = argument.partition("=")
    escaped = value.replace('"', '\\"')
    typed = f'{key}="{escaped}"'
    try:
        (override,) = OverridesParser.create().parse_overrides([typed])
    except HydraException:
        return None
    same = equals and not value.startswith(("[", "{")) and str(override.value()) == value
    return shlex.quote(typed) if same else None


def text(value: Any) -> str:
    """A value as it stands on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    return str(value)
