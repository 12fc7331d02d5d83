"""Overrides of a command line, before Hydra reads them: the experiment that they are of, or none.

An experiment's rows are variants, each with a coding and a label. An override that chooses another
coding, a field of it or the label would run under names that no longer say what ran.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from pipeline.run.additions import opened
from pipeline.run.shipped import CONF
from stages.errors import InputError

FLAGS = ("-m", "--multirun")


@dataclass(frozen=True)
class Variant:
    """A row of an experiment: its coding, and what it sets beside it by dotted key."""

    coding: str | None
    sets: frozenset[str]


def settled(arguments: Sequence[str], default: str | None = None, conf: Path = CONF) -> list[str]:
    """The arguments with the experiment they are of where it is not that of conf/config.yaml.

    Without experiment=NAME, an override of the coding, of a field of it or of the label asks for one
    conversion, or for a sweep over exactly the values that it lists: experiment=none. Where nothing
    asks for that, `default` is the experiment. Raises InputError where rows would lose or bend an
    override, and Hydra's OverrideParseException where one cannot be read.
    """
    arguments = spelled(arguments, conf)
    given = {str(o.key_or_group): o for o in _read(arguments)}
    _check_choices(given, conf)
    if (place := given.get("hydra.output_subdir")) is not None:
        raise InputError(
            f"{place.input_line}: a job's configuration is read from .hydra in its folder; choose the "
            "folder by hydra.run.dir=FOLDER or hydra.sweep.dir=FOLDER"
        )
    chosen = _choices(given.get("variant"))
    if chosen and "coding" in given:
        raise InputError(
            f"{given['variant'].input_line} and {given['coding'].input_line} both choose codings: give "
            "one of them"
        )
    added = []
    if "experiment" not in given:
        if not chosen and any(_names_coding(key) for key in given):
            added = ["experiment=none"]
        elif default is not None:
            added = [f"experiment={default}"]
    experiment, *more = _choices(given.get("experiment")) or [_value(added) or _default(conf)]
    if more:
        raise InputError(f"{given['experiment'].input_line}: give one experiment a command")
    _check_groups(given, experiment, conf)
    _check_rows(given, experiment, chosen, conf)
    swept = any(o.is_sweep_override() for o in given.values())
    if experiment == "none" and swept and "hydra.mode" not in given and not {*FLAGS} & {*arguments}:
        added.append("hydra.mode=MULTIRUN")
    return [*arguments, *added]


def spelled(arguments: Sequence[str], conf: Path = CONF) -> list[str]:
    """The arguments as Hydra reads them, which has no null for a group and adds a key by `++`."""
    files = [re.sub(r"^(experiment|variant)=null$", r"\1=none", each) for each in arguments]
    return opened(files, conf)


def quoted(argument: str) -> str | None:
    """What to type for an override whose value is to be taken as it is; None where that is no help."""
    key, equals, value = argument.partition("=")
    escaped = value.replace('"', '\\"')
    text = f'{key}="{escaped}"'
    try:
        (override,) = OverridesParser.create().parse_overrides([text])
    except HydraException:
        return None
    same = equals and not value.startswith(("[", "{")) and str(override.value()) == value
    return shlex.quote(text) if same else None


def _read(arguments: Sequence[str]) -> list[Override]:
    """The overrides among the arguments, the others being flags and what they take."""
    parser, found = OverridesParser.create(), []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-") or (before.startswith("-") and "=" not in argument):
            continue
        if "=" not in argument and not argument.startswith("~"):
            whole = quoted(f"{before} {argument}") if before else None
            hint = f"; if it belongs to {before}, type {whole}" if whole else ""
            raise InputError(f"{argument}: options are given as KEY=VALUE{hint}")
        found += parser.parse_overrides([argument])
    return found


def _check_choices(given: Mapping[str, Override], conf: Path) -> None:
    """Raises InputError where a group gets no name, for which Hydra has a ValueError."""
    for key, override in given.items():
        plain = not (override.is_delete() or override.is_sweep_override())
        if plain and (conf / key).is_dir() and not isinstance(override.value(), str):
            known = ", ".join(_files(conf / key))
            raise InputError(f"{override.input_line}: give one name, out of {known}")


def _names_coding(key: str) -> bool:
    return key in ("coding", "label") or key.startswith("coding.")


def _choices(override: Override | None) -> list[str]:
    """The values of an override of a group, one or those of its sweep; none for none."""
    if override is None:
        return []
    if isinstance(override.value(), Glob):
        raise InputError(f"{override.input_line}: give the names, as {override.key_or_group}=A,B")
    if override.is_sweep_override():
        return [str(each) for each in override.sweep_string_iterator()]
    return (
        []
        if override.value() == "none" and override.key_or_group == "variant"
        else [str(override.value())]
    )


def _value(added: Sequence[str]) -> str | None:
    return added[0].partition("=")[2] if added else None


def _check_groups(given: Mapping[str, Override], experiment: str, conf: Path) -> None:
    """Raises InputError where a chosen file's keys are lost to those that the experiment sets."""
    whole = dict(_yaml(conf / "experiment" / f"{experiment}.yaml") or {})
    params = whole.pop("hydra", {}).get("sweeper", {}).get("params") or {}
    sets = [*_leaves(whole), *params]
    for key in (k for k in given if (conf / k).is_dir() and k not in ("variant", "coding")):
        if lost := [name for name in sets if name.startswith(f"{key}.")]:
            raise InputError(
                f"{given[key].input_line}: experiment={experiment} sets {', '.join(lost)} itself; give "
                "those keys instead"
            )


def _check_rows(
    given: Mapping[str, Override], experiment: str, chosen: Sequence[str], conf: Path
) -> None:
    """Raises InputError on an override that a row of the experiment would lose, or be misnamed by."""
    names = list(chosen) or _rows(conf, experiment)
    rows = {name: row for name in names if (row := variant(conf, name)) is not None}
    of = f" of experiment={experiment}" if experiment != "none" else ""
    alone = "experiment=null"
    if chosen:  # without an experiment the variants would still be rows
        first = next((row.coding for row in rows.values() if row.coding), "NAME")
        alone = f"coding={first} in place of {given['variant'].input_line}"
    if rows and (coding := given.get("coding")) is not None:
        same = [name for name in rows if rows[name].coding == coding.value()] or [
            name
            for name in _files(conf / "variant")
            if (row := variant(conf, name)) is not None and row.coding == coding.value()
        ]
        instead = f"variant={','.join(same)}" if same else "variant=NAME"
        raise InputError(
            f"{coding.input_line}: the rows{of} choose their codings by variant; give {instead} "
            f"instead, or experiment=null {coding.input_line} for one conversion"
        )
    if len(rows) > 1 and "label" in given:
        raise InputError(
            f"{given['label'].input_line} would give the {len(rows)} rows{of} one name; give "
            f"{alone} for one conversion"
        )
    for key, override in given.items():
        _check_row(key, override, rows, of, alone, conf)


def _check_row(
    key: str, override: Override, rows: Mapping[str, Variant], of: str, alone: str, conf: Path
) -> None:
    setting = [n for n, row in rows.items() if any(_within(key, own) for own in row.sets)]
    field = key.partition(".")[2].partition(".")[0] if key.startswith("coding.") else None
    lacking = [
        name
        for name, row in rows.items()
        if field
        and row.coding is not None
        and field not in fields(conf, row.coding)
        and not override.is_add()
        and not override.is_force_add()
    ]
    if not setting and not lacking:
        return
    why = [f"{', '.join(setting)} set it themselves"] if setting else []
    why += [f"{', '.join(lacking)} have no {field}"] if lacking else []
    rest = ",".join(name for name in rows if name not in (*setting, *lacking))
    instead = f"variant={rest} beside it, or " if rest else ""
    raise InputError(
        f"{override.input_line} does not fit all rows{of}: {'; '.join(why)}. Give {instead}"
        f"{alone} for one conversion"
    )


def _within(key: str, other: str) -> bool:
    """Whether one dotted key is the other, or lies below it."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


@functools.cache
def variant(conf: Path, name: str) -> Variant | None:
    """What conf/variant/`name`.yaml chooses and sets; None where there is no such file."""
    whole = _yaml(conf / "variant" / f"{name}.yaml")
    if whole is None:
        return None
    parts: list[Any] = whole.pop("defaults", [])
    coding = next((d["override /coding"] for d in parts if "override /coding" in d), None)
    whole.pop("label", None)
    return Variant(coding, frozenset(_leaves(whole)))


@functools.cache
def fields(conf: Path, coding: str) -> tuple[str, ...]:
    """The keys of conf/coding/`coding`.yaml."""
    return tuple(key for key in _yaml(conf / "coding" / f"{coding}.yaml") or {} if key[0] != "_")


def having(conf: Path, field: str) -> list[str]:
    """The codings that have a field."""
    return [name for name in _files(conf / "coding") if field in fields(conf, name)]


def _rows(conf: Path, experiment: str) -> list[str]:
    """The variants that an experiment runs."""
    whole = _yaml(conf / "experiment" / f"{experiment}.yaml") or {}
    params = whole.get("hydra", {}).get("sweeper", {}).get("params") or {}
    return [name.strip() for name in str(params.get("variant", "")).split(",") if name.strip()]


def _default(conf: Path) -> str:
    """The experiment that conf/config.yaml names."""
    parts = (_yaml(conf / "config.yaml") or {})["defaults"]
    return str(next(p["experiment"] for p in parts if isinstance(p, dict) and "experiment" in p))


def _files(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _yaml(file: Path) -> dict[str, Any] | None:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {} if file.is_file() else None


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
