"""What the paper's tables look like: from rows of the store to sheets, one function a layout.

A yaml in conf/table names one by `_target_` and gives it its options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from pipeline.results.columns import (
    DIVERGED,
    Column,
    bounded_perplexity,
    percent,
    scientific,
    small,
)
from pipeline.results.lookup import Row
from pipeline.results.published import as_measured, printed
from pipeline.results.rows import COSTS, ENERGIES, environment, measures, result_frame, row_name
from pipeline.tables import captions
from pipeline.tables.sheet import Sheet
from stages.errors import InputError
from stages.model.sites import ROLES

NAMES = (
    Column("model", "model", words=True),
    Column("transform", "transform", words=True),
    Column("method", "method", words=True),
    Column("setting", "setting", words=True),
    Column("grains", "n"),
    Column("timesteps", "T"),
)
SECONDS = Column("conversion_s", "conversion [s]", "{:.1f}".format, spare=2)


def main(
    rows: Sequence[Row], names: Mapping[str, str], published: Sequence[Mapping[str, Any]]
) -> Sheet:
    """Method x T: seconds of conversion, mean perplexity, mean accuracy; published rows below."""
    rows = _ordered(rows)
    frame = _with_means(_frame(rows, names))
    rivals, sections = _rivals(frame), _sections(frame)
    caption = captions.sentences(
        captions.model(frame),
        captions.perplexity(rows[0]),
        captions.accuracy(rows[0]),
        captions.conversion(rows),
        captions.BEST,
        captions.diverged(frame),
    )
    ppl, accuracy = _means(rows[0])
    if published:
        sources = list(dict.fromkeys(row["source"] for row in published))
        theirs = [as_measured(row, sources.index(row["source"]) + 1) for row in published]
        frame = pd.concat([frame, pd.DataFrame(theirs)], ignore_index=True)
        frame = frame.astype({"grains": "Int64", "timesteps": "Int64", "conversion_s": "float64"})
        rivals += [False] * len(published)
        sections += [(row["model"],) for row in published]
        ppl = replace(ppl, show=printed, beside=("printed",))
        caption = captions.sentences(caption, captions.published(sources))
    columns = _filled([*_names(frame), SECONDS, ppl, accuracy], frame)
    return Sheet(frame, columns, caption, sections, rivals)


def energy(rows: Sequence[Row], names: Mapping[str, str]) -> Sheet:
    """Operations, joules and saving in both conventions: of a window, below of a decoded token."""
    rows = _ordered(rows)
    named = _with_means(_frame(rows, names)).drop(columns=[*COSTS])
    parts = []
    for phase in ("prefill", "decode"):
        part = named.assign(phase=phase)
        for (convention, other), place in ENERGIES.items():
            if other == phase:
                totals = [row.result[place] if place else row.result for row in rows]
                for cost in COSTS:
                    part[f"{cost}_{convention}"] = [total[cost] for total in totals]
        parts.append(part)
    frame = pd.concat(parts, ignore_index=True)
    columns = [Column("phase", "phase", words=True), *_names(frame)]
    columns += _means(rows[0])[:1]
    for group in ("paper", "causal"):
        columns += [
            Column(f"macs_G_{group}", "MACs [G]", lambda v: small(v, 4), group=group, spare=1),
            Column(f"acs_G_{group}", "ACs [G]", lambda v: small(v, 4), group=group, spare=1),
            Column(f"energy_J_{group}", "energy [J]", lambda v: small(v, 3), "min", group),
            Column(f"saving_{group}", "saving [%]", _tenths, "max", group),
        ]
    caption = captions.sentences(
        captions.model(frame),
        captions.energy(rows[0]),
        captions.perplexity(rows[0]),
        captions.BEST,
        captions.diverged(frame),
    )
    sections = [(p, *s) for p, s in zip(frame["phase"], _sections(frame), strict=True)]
    return Sheet(frame, columns, caption, sections, _rivals(frame))


def grains(rows: Sequence[Row]) -> Sheet:
    """Mean perplexity by n and T, a line for every coding and n; the dense model's in every column."""
    rows = _ordered(rows)
    frame = _with_means(_frame(rows, {}))
    frame["method"] = frame["coding"]
    names = [column.name for column in NAMES if column.name in frame]
    names.remove("timesteps")
    steps = sorted({int(t) for t in frame["timesteps"].dropna()})
    lines: dict[tuple[Any, ...], dict[str, float]] = {}
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for (_, row), source in zip(frame.iterrows(), rows, strict=True):
        place = tuple(None if pd.isna(row[name]) else row[name] for name in names)
        line = lines.setdefault(place, {})
        for t in steps if pd.isna(row["timesteps"]) else [row["timesteps"]]:
            if f"ppl_T{t}" in line:
                raise InputError(
                    f"table grains: {source.run.settings.name} is not the only job of its coding, n "
                    "and T; give the axis that tells them apart one value"
                )
            line[f"ppl_T{t}"] = row["ppl_mean"]
        places.setdefault(place, []).extend(source.result.get("environments") or ())
    columns = [*names, *(f"ppl_T{t}" for t in steps)]
    table = pd.DataFrame([dict(zip(names, p, strict=True)) | v for p, v in lines.items()])
    table = table.reindex(columns=columns).astype({"grains": "Int64"})
    table["environment"] = [environment({"environments": each}) for each in places.values()]
    group = _means(rows[0])[0].head
    over = [Column(f"ppl_T{t}", f"T = {t}", bounded_perplexity, "min", group) for t in steps]
    caption = captions.sentences(
        captions.model(table),
        captions.perplexity(rows[0]),
        captions.GRAINS,
        captions.BEST,
        captions.diverged(table),
    )
    rivals = list(table["method"] != "dense")
    return Sheet(table, [*_names(table), *over], caption, [0] * len(table), rivals)


def codings(rows: Sequence[Row], names: Mapping[str, str]) -> Sheet:
    """Everything that was measured of every job."""
    rows = _ordered(rows)
    frame = _frame(rows, names)
    corpora, tasks = _measures(frame)
    columns = [
        *_names(frame),
        Column("bits", "bits", "{:.3g}".format),
        *(
            Column(n, f"ppl {n[4:]}", bounded_perplexity, "min", spare=k)
            for k, n in enumerate(corpora)
        ),
        *(_accuracy(name, f"{name[4:]} [%]") for name in tasks),
        Column("nmse", "nmse", lambda value: scientific(value, 1), "min"),
        Column("spikes_per_value", "spikes / value", "{:.3f}".format),
        Column("energy_J", "energy [J]", lambda value: small(value, 3), "min"),
        Column("saving", "saving [%]", _tenths, "max"),
        SECONDS,
    ]
    caption = captions.sentences(
        captions.model(frame),
        captions.perplexity(rows[0]),
        captions.accuracy(rows[0]),
        "nmse: geometric mean over sites, on held-out activations.",
        "Energy: one window, causal convention.",
        captions.conversion(rows),
        captions.BEST,
        captions.diverged(frame),
    )
    return Sheet(frame, _filled(columns, frame), caption, _sections(frame), _rivals(frame))


def per_site(rows: Sequence[Row]) -> Sheet:
    """The sites of one configuration by role and layer: error, spikes a value, number of values."""
    if len(rows) != 1:
        raise InputError(
            f"table per_site shows one configuration, got {len(rows)}: narrow the axes of the "
            "experiment, or give experiment=null and a coding"
        )
    (row,) = rows
    order = {role: place for place, role in enumerate(ROLES)}
    frame = row.sites.assign(place=row.sites["role"].map(order))
    frame = frame.sort_values(["place", "layer"], kind="stable", ignore_index=True)
    frame = frame[["role", "layer", "nmse", "spikes_per_value", "values", "site"]]
    frame = frame.assign(environment=environment(row.result))
    columns = [
        Column("role", "role", words=True),
        Column("layer", "layer", lambda layer: "" if layer < 0 else str(layer)),
        Column("nmse", "nmse", lambda value: scientific(value, 1)),
        Column("spikes_per_value", "spikes / value", "{:.3f}".format),
        Column("values", "values", "{:.0f}".format),
    ]
    settings = row.run.settings
    caption = (
        f"Sites of {settings.name}, model {settings.model.name}. nmse: on held-out calibration "
        f"windows; spikes and values: on {captions.windows(row, settings.evaluation.corpora[:1])}."
    )
    return Sheet(frame, columns, caption, list(frame["role"]))


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """By model, transform and T, otherwise in the order of the jobs; the dense model first.

    Raises InputError where not all are evaluated on the same: no mean would compare.
    """
    if len({row.run.settings.evaluation for row in rows}) > 1:
        raise InputError(
            "the rows are evaluated on different texts or questions, so they do not compare: give "
            "every evaluation.* one value"
        )
    axes = [row.result for row in rows]
    places = {n: list(dict.fromkeys(a[n] for a in axes)) for n in ("model", "transform")}
    keys = [
        (*(order.index(a[name]) for name, order in places.items()), a["timesteps"] or 0)
        for a in axes
    ]
    return [rows[i] for i in sorted(range(len(rows)), key=keys.__getitem__)]


def _frame(rows: Sequence[Row], names: Mapping[str, str]) -> pd.DataFrame:
    """The rows with the name of their `method`: that of the row, or what `names` calls it."""
    results = [row.result for row in rows]
    shown = [row_name(result) for result in results]
    frame = result_frame(results).drop(columns="row", errors="ignore")
    frame.insert(0, "row", shown)
    frame.insert(0, "method", [names.get(name, name) for name in shown])
    return frame


def _measures(frame: pd.DataFrame) -> tuple[list[str], list[str]]:
    """The columns of perplexities and of accuracies."""
    corpora, tasks = measures(frame)
    return [f"ppl_{name}" for name in corpora], [f"acc_{name}" for name in tasks]


def _with_means(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with arithmetic means over its corpora and its tasks, as the paper takes them."""
    corpora, tasks = _measures(frame)
    frame = frame.assign(
        ppl_mean=frame[corpora].mean(axis=1, skipna=False),
        acc_mean=math.nan,
        acc_mean_se=math.nan,
    )
    if tasks:
        frame["acc_mean"] = frame[tasks].mean(axis=1, skipna=False)
        squares = frame[[f"{task}_se" for task in tasks]] ** 2  # the tasks are independent
        frame["acc_mean_se"] = squares.sum(axis=1, skipna=False) ** 0.5 / len(tasks)
    return frame


def _means(row: Row) -> list[Column]:
    spec = row.run.settings.evaluation
    ppl, acc = ("mean " * (len(names) > 1) for names in (spec.corpora, spec.tasks))
    return [
        Column("ppl_mean", f"{ppl}perplexity", bounded_perplexity, "min"),
        _accuracy("acc_mean", f"{acc}accuracy [%]"),
    ]


def _accuracy(name: str, head: str) -> Column:
    return Column(name, head, percent, "max", beside=(f"{name}_se",), spare=1)


def _names(frame: pd.DataFrame) -> list[Column]:
    """The columns of names, without a model and a transform that all rows share: the caption has it."""
    shared = [n for n in ("model", "transform") if n in frame and frame[n].nunique() == 1]
    return [column for column in NAMES if column.name in frame and column.name not in shared]


def _filled(columns: Sequence[Column], frame: pd.DataFrame) -> list[Column]:
    """Those that hold anything."""
    return [c for c in columns if c.name in frame and frame[c.name].notna().any()]


def _sections(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    names = [name for name in ("model", "transform", "timesteps") if name in frame]
    rows = frame[names].itertuples(index=False)
    return [tuple(None if pd.isna(value) else value for value in row) for row in rows]


def _rivals(frame: pd.DataFrame) -> list[bool]:
    """Which rows compete: what spikes, and did not diverge: a broken model spikes little."""
    corpora, _ = _measures(frame)
    alive = (frame[corpora] <= DIVERGED).all(axis=1)
    return list(alive & frame["spikes_per_value"].notna())


def _tenths(value: float) -> str:
    return f"{100 * value:.1f}"
