"""Texts and tasks of a user on a command line: `corpus.mine.path=FILE` is all that a text takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.run.shipped import CONF, entries
from stages.errors import InputError, nearest

# Where the entries of a group are chosen: options, and the folders of conf/ whose files may do so.
CHOSEN_BY = {
    "corpus": ("calibration.corpus", "evaluation.corpora"),
    "tasks": ("evaluation.tasks",),
}
FOLDERS = ("calibration", "evaluation", "experiment")
KEY = re.compile(r"\+{0,2}(corpus|tasks)\.([A-Za-z_][\w-]*)[.=].*", re.DOTALL)


def opened(overrides: Sequence[str], conf: Path = CONF) -> list[str]:
    """The overrides, with those of entries that conf/ lacks written as Hydra adds keys.

    Raises InputError for such an entry that nothing on the command line or in conf/ chooses: its
    name is misspelt, or it is not evaluated.
    """
    if not any(KEY.fullmatch(each) for each in overrides):
        return list(overrides)
    known = {group: entries(group, conf) for group in CHOSEN_BY}
    return [_opened(each, overrides, known, conf) for each in overrides]


def _opened(
    override: str, overrides: Sequence[str], known: Mapping[str, Sequence[str]], conf: Path
) -> str:
    match = KEY.fullmatch(override)
    if match is None or match[2] in known[match[1]]:
        return override
    group, name = match[1], match[2]
    if not _chosen(group, name, overrides, conf):
        near = nearest(name, known[group])
        options = [
            f"{option}={name}" if option == "calibration.corpus" else f"{option}=[{name}]"
            for option in CHOSEN_BY[group]
        ]
        raise InputError(
            f"{group}.{name} is chosen by nothing: {f'{near} Otherwise' if near else 'to use it'} give "
            f"{' or '.join(options)}"
        )
    return f"++{override.lstrip('+')}"


def _chosen(group: str, name: str, overrides: Sequence[str], conf: Path) -> bool:
    word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") in CHOSEN_BY[group] and word.search(value):
            return True
    files = (file for folder in FOLDERS for file in (conf / folder).glob("*.yaml"))
    lines = (line.partition("#")[0] for file in files for line in file.read_text().splitlines())
    return any(word.search(line) for line in lines)
