"""A sweep as the overrides of its jobs: the product of its axes with the rows of its experiment.

A row is a name with overrides of the conversion, its coding first. An override of a field that only
some of the chosen codings have reaches the jobs of these.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override

from pipeline.run.grammar import text
from pipeline.run.shipped import CONF, fields
from stages.errors import InputError, nearest

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Overrides:
    """Those of one job: as a person types them, and what the name of its row stands for."""

    typed: tuple[str, ...]
    row: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """What Hydra composes the job of."""
        return (*self.typed, *self.row)


@dataclass(frozen=True)
class Sweep:
    """The jobs in their order, and which of them an option has reached that not all of them have."""

    jobs: tuple[Overrides, ...]
    notes: tuple[str, ...]


def swept(
    given: Sequence[str],
    params: Mapping[str, Any],
    rows: Mapping[str, Row],
    coding: str,
    conf: Path = CONF,
) -> Sweep:
    """The jobs of `given`, whose overrides win over the axes `params` of an experiment with `rows`.

    The last axis varies fastest, behind it the rows. `coding` is that of jobs which choose none.
    Raises InputError for an unknown row, and for what rows would lose or be misnamed by.
    """
    axes = _axes([*(f"{key}={value}" for key, value in params.items()), *given])
    chosen: dict[str | None, Row] = {None: {}}
    if rows:
        picked = [value.partition("=")[2] for value in axes.pop("row", ())] or [*rows]
        chosen = {name: _row(name, rows) for name in picked}
        _check(axes, {name: rows[name] for name in picked}, rows)
    reach: dict[str, dict[str, bool]] = {}  # by override: which rows or codings have its field
    crossed = []
    for values in itertools.product(*axes.values()):
        for name, row in chosen.items():
            of = str(row.get("coding") or _coding(values) or coding)
            for value in filter(_field, values):
                reach.setdefault(value, {})[name or of] = _has(of, value, conf)
            crossed.append((values, name, row, of))
    partial = [value for value, has in reach.items() if any(has.values())]
    jobs: dict[Overrides, None] = {}
    for values, name, row, of in crossed:
        left = [v for v in values if v not in partial or _has(of, v, conf)]
        named = [] if name is None else [f"row={name}"]
        jobs[Overrides((*left, *named), overrides(row))] = None
    return Sweep(
        tuple(jobs), tuple(_note(v, reach[v]) for v in partial if not all(reach[v].values()))
    )


def of_sweeper(hydra: Any, name: str) -> dict[str, Any]:
    """The `rows` or `params` of a composed sweeper; a sweeper of Hydra's may have none."""
    return dict(hydra.sweeper[name] or {}) if name in hydra.sweeper else {}


def overrides(row: Row) -> tuple[str, ...]:
    """What the name of a row stands for, as it is typed."""
    return tuple(f"{key}={text(value)}" for key, value in row.items())


def plain(given: Sequence[str]) -> list[str]:
    """Overrides with an axis of one value as that value."""
    return [values[0] if len(values) == 1 else line for line, values in _lines(given)]


def typed(every: Iterable[str], rows: Mapping[str, Row]) -> list[str]:
    """The overrides of a job without those that the name of its row stands for."""
    every = list(every)
    name = next((each.removeprefix("row=") for each in every if each.startswith("row=")), None)
    meant = overrides(rows.get(name or "", {}))
    return [each for each in every if each not in meant]


def _axes(given: Sequence[str]) -> dict[str, list[str]]:
    """What every key is given, one override for each value; the last override of a key wins."""
    return {values[0].partition("=")[0]: values for _, values in _lines(given)}


def _lines(given: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Every override with one for each of its values."""
    parser = OverridesParser.create()
    return [(str(o.input_line), _values(o)) for o in parser.parse_overrides([*given])]


def _values(override: Override) -> list[str]:
    key = override.get_key_element()
    if override.is_delete():
        return [str(override.input_line)]
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep() or isinstance(override.value(), Glob):
        raise InputError(
            f"{override.input_line}: give the values, as {key}=A,B or {key}=range(1,4)"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _row(name: str, rows: Mapping[str, Row]) -> Row:
    if name not in rows:
        near = nearest(name, rows)
        raise InputError(
            f"rows={name}: no such row; {near or 'the experiment has'} {'Choose among ' * bool(near)}"
            f"{', '.join(rows)}"
        )
    return rows[name]


def _check(
    axes: Mapping[str, Sequence[str]], chosen: Mapping[str, Row], rows: Mapping[str, Row]
) -> None:
    """Raises InputError for an override by which a row would no longer be what its name says."""
    if "coding" in axes:
        (value, *_) = axes["coding"]
        same = [
            name for name, row in rows.items() if f"coding={row.get('coding')}" in axes["coding"]
        ]
        instead = f"give rows={','.join(same)}" if same else "choose rows=NAME"
        raise InputError(
            f"{value}: the rows of an experiment have their codings; {instead} instead, or leave the "
            "rows and the experiment out for one conversion"
        )
    for key, values in axes.items():
        setting = [
            name
            for name, row in chosen.items()
            if any(
                _within(key, each) and [f"{each}={text(row[each])}"] != [*values] for each in row
            )
        ]
        if setting:
            rest = ",".join(name for name in chosen if name not in setting)
            raise InputError(
                f"{values[0]} does not fit all rows: {', '.join(setting)} "
                f"{'sets' if len(setting) == 1 else 'set'} it already. Give "
                f"{f'rows={rest} beside it, or ' if rest else ''}coding=NAME {values[0]} without an "
                "experiment for one conversion"
            )


def _within(key: str, other: str) -> bool:
    """Whether two keys are one, or one lies below the other; a choice among files has none below it."""
    above, below = sorted((key, other), key=len)
    return above == below or ("." in above and below.startswith(f"{above}."))


def _coding(values: Iterable[str]) -> str | None:
    return next((v.removeprefix("coding=") for v in values if v.startswith("coding=")), None)


def _field(value: str) -> str:
    """The field of the coding that an override gives; empty where it gives another key."""
    key = value.partition("=")[0]
    return key.split(".")[1] if key.startswith("coding.") else ""


def _has(coding: str, value: str, conf: Path) -> bool:
    """Whether a coding has the field of an override; one without a file of conf may have any."""
    known = fields(coding, conf)
    return known is None or not _field(value) or _field(value) in known


def _note(value: str, reach: Mapping[str, bool]) -> str:
    reached, others = ([name for name, has in reach.items() if has == is_] for is_ in (True, False))
    verb = "has" if len(others) == 1 else "have"
    return f"{value} reaches {', '.join(reached)}; {', '.join(others)} {verb} no {_field(value)}"
