"""Texts and tasks of the user's own on a command line: `corpus.mine.path=FILE` is all it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.run.shipped import CONF
from stages.errors import InputError

# Where the entries of a group are chosen: options, and the folders of conf/ whose files may do so.
_CHOSEN_BY = {
    "corpus": ("calibration.corpus", "evaluation.corpora"),
    "tasks": ("evaluation.tasks",),
}
_FOLDERS = ("calibration", "evaluation", "experiment", "variant")
_KEY = re.compile(r"\+{0,2}(corpus|tasks)\.([A-Za-z_][\w-]*)[.=].*", re.DOTALL)


class _Own(NamedTuple):
    """The override of one key of an entry that conf/ does not have."""

    group: str
    name: str
    added: str  # what Hydra adds the key by


def opened(overrides: Sequence[str], conf: Path = CONF) -> list[str]:
    """The overrides, with those of entries that conf/ lacks written as Hydra adds keys.

    Raises InputError for such an entry that nothing on the command line or in conf/ chooses: its
    name is misspelt, or it is not evaluated.
    """
    if not any(_KEY.fullmatch(each) for each in overrides):
        return list(overrides)
    known = {group: _names(conf, group) for group in _CHOSEN_BY}
    given = [_own(each, known) for each in overrides]
    for own in given:
        if own is not None and not _chosen(own, overrides, conf):
            _refuse(own, known)
    return [each if own is None else own.added for each, own in zip(overrides, given, strict=True)]


def _own(override: str, known: Mapping[str, Sequence[str]]) -> _Own | None:
    match = _KEY.fullmatch(override)
    if match is None or match[2] in known[match[1]]:
        return None
    return _Own(match[1], match[2], f"++{override.lstrip('+')}")


def _names(conf: Path, group: str) -> list[str]:
    """The entries of every file of a group."""
    import yaml

    files = sorted((conf / group).glob("*.yaml"))
    return [name for file in files for name in yaml.safe_load(file.read_text()) or {}]


def _chosen(own: _Own, overrides: Sequence[str], conf: Path) -> bool:
    word = re.compile(rf"(?<![\w-]){re.escape(own.name)}(?![\w-])")
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") in _CHOSEN_BY[own.group] and word.search(value):
            return True
    files = (file for folder in _FOLDERS for file in (conf / folder).glob("*.yaml"))
    lines = (line.partition("#")[0] for file in files for line in file.read_text().splitlines())
    return any(word.search(line) for line in lines)


def _refuse(own: _Own, known: Mapping[str, Sequence[str]]) -> None:
    from difflib import get_close_matches

    close = get_close_matches(own.name, known[own.group], n=1)
    meant = f"did you mean {own.group}.{close[0]}? Otherwise" if close else "to use it"
    options = [
        f"{option}={own.name}" if option == "calibration.corpus" else f"{option}=[{own.name}]"
        for option in _CHOSEN_BY[own.group]
    ]
    raise InputError(
        f"{own.group}.{own.name} is chosen by nothing: {meant} give {' or '.join(options)}"
    )
