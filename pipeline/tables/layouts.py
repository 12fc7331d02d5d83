"""What the paper's tables look like: from rows of the store to sheets, one function a layout.

A yaml in conf/table names one by `_target_` and gives it its options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from pipeline.results import uncertainty
from pipeline.results.columns import (
    DIVERGED,
    Column,
    bounded_perplexity,
    excess,
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
STEPS = Column("steps", "steps", spare=1)
SECONDS = Column("conversion_s", "conversion [s]", "{:.1f}".format, spare=2)


def main(
    rows: Sequence[Row], names: Mapping[str, str], published: Sequence[Mapping[str, Any]]
) -> Sheet:
    """Method x T: seconds of conversion, mean perplexity, mean accuracy; published rows below."""
    rows = _ordered(rows)
    frame = uncertainty.with_means(_frame(rows, names))
    rivals, sections = _rivals(frame), _sections(frame)
    caption = captions.sentences(
        captions.model(frame),
        captions.perplexity(rows[0]),
        captions.accuracy(rows[0]),
        captions.conversion(rows),
        captions.BEST,
        captions.diverged(frame),
    )
    ppl, versus, accuracy = _means(rows[0])
    if published:
        sources = list(dict.fromkeys(row["source"] for row in published))
        theirs = [as_measured(row, sources.index(row["source"]) + 1) for row in published]
        frame = pd.concat([frame, pd.DataFrame(theirs)], ignore_index=True)
        frame = frame.astype({"grains": "Int64", "timesteps": "Int64", "conversion_s": "float64"})
        rivals += [False] * len(published)
        sections += [(row["model"],) for row in published]
        ppl = replace(ppl, show=printed, beside=("printed", *ppl.beside))
        caption = captions.sentences(caption, captions.published(sources))
    columns = _filled([*_names(frame), SECONDS, ppl, versus, accuracy], frame)
    return Sheet(frame, columns, caption, sections, rivals)


def energy(rows: Sequence[Row], names: Mapping[str, str]) -> Sheet:
    """Operations, joules and saving in both conventions: of a window, below of a decoded token."""
    rows = _ordered(rows)
    named = uncertainty.with_means(_frame(rows, names)).drop(columns=[*COSTS])
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
    columns += _means(rows[0])[:2]
    for group in ("paper", "causal"):
        columns += [
            Column(f"macs_G_{group}", "MACs [G]", lambda v: small(v, 4), group=group, spare=1),
            Column(f"acs_G_{group}", "ACs [G]", lambda v: small(v, 4), group=group, spare=1),
            Column(f"energy_J_{group}", "energy [J]", lambda v: small(v, 3), "min", group=group),
            Column(f"saving_{group}", "saving [%]", _tenths, "max", group=group),
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
    frame = uncertainty.with_means(_frame(rows, {}))
    frame["method"] = frame["coding"]
    names = [column.name for column in NAMES if column.name in frame]
    names.remove("timesteps")
    steps = sorted({int(t) for t in frame["timesteps"].dropna()})
    measured = {f"ppl_mean{end}": f"ppl_T{{}}{end}" for end in ("", "_se", "_spread")}
    measured |= {f"ratio_ppl_mean{end}": f"ratio_T{{}}{end}" for end in ("", "_low", "_high")}
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
            line.update({name.format(t): row[of] for of, name in measured.items()})
        places.setdefault(place, []).extend(source.result.get("environments") or ())
    columns = [*names, *(name.format(t) for name in measured.values() for t in steps)]
    table = pd.DataFrame([dict(zip(names, p, strict=True)) | v for p, v in lines.items()])
    table = table.reindex(columns=columns).astype({"grains": "Int64"})
    table["replicates"] = rows[0].result["replicates"]
    table["environment"] = [environment({"environments": each}) for each in places.values()]
    group = _means(rows[0])[0].head
    over = [_perplexity(f"ppl_T{t}", f"T = {t}", f"ratio_T{t}", group) for t in steps]
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
    corpora, tasks = measures(frame)
    columns = [
        *_names(frame),
        STEPS,
        Column("bits", "bits", "{:.3g}".format),
        *(
            column
            for k, name in enumerate(corpora)
            for column in (
                _perplexity(f"ppl_{name}", *_head(name, corpora), spare=k),
                _versus(f"ratio_{name}", _head(name, corpora)[2], spare=k + 1),
            )
        ),
        *(_accuracy(f"acc_{name}", f"{name} [%]", f"ratio_{name}") for name in tasks),
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
        f"{captions.STEPS}." if STEPS.name in frame else "",
        "nmse: geometric mean over sites, on held-out activations.",
        "Energy: one window, causal convention.",
        captions.conversion(rows),
        captions.BEST,
        captions.diverged(frame),
    )
    return Sheet(frame, _filled(columns, frame), caption, _sections(frame), _rivals(frame))


def per_site(rows: Sequence[Row]) -> Sheet:
    """The sites of one configuration by role and layer: error, also against the bound, spikes a value,
    number of values."""
    if len(rows) != 1:
        raise InputError(
            f"table per_site shows one configuration, got {len(rows)}: narrow the axes of the "
            "experiment, or give experiment=null and a coding"
        )
    (row,) = rows
    order = {role: place for place, role in enumerate(ROLES)}
    frame = row.sites.assign(place=row.sites["role"].map(order))
    frame = frame.sort_values(["place", "layer"], kind="stable", ignore_index=True)
    frame = frame[["role", "layer", "nmse", "bound_db", "spikes_per_value", "values", "site"]]
    frame = frame.assign(environment=environment(row.result))
    columns = [
        Column("role", "role", words=True),
        Column("layer", "layer", lambda layer: "" if layer < 0 else str(layer)),
        Column("nmse", "nmse", lambda value: scientific(value, 1)),
        Column("bound_db", "above Shannon [dB]", "{:.1f}".format, spare=1),
        Column("spikes_per_value", "spikes / value", "{:.3f}".format),
        Column("values", "values", "{:.0f}".format),
    ]
    settings = row.run.settings
    caption = (
        f"Sites of {settings.name}, model {settings.model.name}. nmse: on held-out calibration "
        f"windows; above Shannon: {captions.BOUND}; spikes and values: on "
        f"{captions.windows(row, settings.evaluation.corpora[:1])}."
    )
    return Sheet(frame, _filled(columns, frame), caption, list(frame["role"]))


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


def _means(row: Row) -> list[Column]:
    """The columns of the mean perplexity, of what it is above the dense model's, and of the accuracy."""
    spec = row.run.settings.evaluation
    ppl, acc = ("mean " * (len(names) > 1) for names in (spec.corpora, spec.tasks))
    return [
        _perplexity("ppl_mean", f"{ppl}perplexity", "ratio_ppl_mean"),
        _versus("ratio_ppl_mean"),
        _accuracy("acc_mean", f"{acc}accuracy [%]", "ratio_acc_mean"),
    ]


def _head(corpus: str, corpora: Sequence[str]) -> tuple[str, str, str]:
    """The head of a corpus' perplexity, the column of its ratio, and the group of both, one of several."""
    several = len(corpora) > 1
    return "ppl" if several else f"ppl {corpus}", f"ratio_{corpus}", corpus * several


def _perplexity(name: str, head: str, ratio: str, group: str = "", spare: int = 0) -> Column:
    error = (f"{name}_se",)
    return Column(name, head, bounded_perplexity, "min", ratio, group, error, spare=spare)


def _versus(ratio: str, group: str = "", spare: int = 1) -> Column:
    bounds = (f"{ratio}_low", f"{ratio}_high")
    return Column(ratio, "vs dense", excess, group=group, beside=bounds, spare=spare)


def _accuracy(name: str, head: str, ratio: str) -> Column:
    return Column(name, head, percent, "max", ratio, beside=(f"{name}_se",), spare=1)


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
    corpora, _ = measures(frame)
    alive = (frame[[f"ppl_{name}" for name in corpora]] <= DIVERGED).all(axis=1)
    return list(alive & frame["spikes_per_value"].notna())


def _tenths(value: float) -> str:
    return f"{100 * value:.1f}"
