"""The table of energy under hardware profiles: against the dense model, and against integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pipeline.results.columns import Column, excess
from pipeline.results.lookup import Row
from pipeline.results.rows import RATIO, UNDER, environment, profiles, row_name
from pipeline.tables import captions
from pipeline.tables.sheet import Sheet
from stages.errors import InputError

NUMBERS = ("ratio", "low", "high", "spikes_per_value")


def energy_models(
    rows: Sequence[Row],
    names: Mapping[str, str],
    workloads: Sequence[Sequence[Any]],
    against: str,
    shown: Sequence[str],
) -> Sheet:
    """What every row saves under every profile, by model and workload, and what it costs over the row
    `against` under the profiles `shown`.

    `workloads` are pairs of a phase and the tokens of its prompt or context. Spikes a value and the
    perplexity are those of the model that was run; its rates are also those of the models of
    `energy.models`. Raises InputError where the rows lack a workload or the row `against`.
    """
    hardware = profiles(dict.fromkeys(name for row in rows for name in row.result))
    entries = [
        _entry(row, model, phase, tokens, costs, hardware)
        for row in rows
        for model, phase, tokens, costs in _workloads(row)
        if [phase, tokens] in [list(each) for each in workloads]
    ]
    if not entries:
        wanted = ", ".join(f"{phase} {tokens}" for phase, tokens in workloads)
        raise InputError(f"no row has a workload of {wanted}: give energy.tokens those lengths")
    frame = pd.DataFrame(entries)
    order = {f"{phase} {tokens}": place for place, (phase, tokens) in enumerate(workloads)}
    models = list(dict.fromkeys(frame["model"]))
    frame["place"] = frame["model"].map(models.index) * len(order) + frame["workload"].map(order)
    frame = frame.sort_values("place", kind="stable", ignore_index=True).drop(columns="place")
    frame = _over(frame, against, hardware)
    frame["method"] = [names.get(name, name) for name in frame["row"]]
    columns = [
        Column("model", "model", words=True),
        Column("workload", "workload", words=True),
        Column("method", "method", words=True),
        Column("timesteps", "T, b"),
        Column("ratio", "vs dense", excess, beside=("low", "high"), spare=2),
        Column("spikes_per_value", "spikes / value", "{:.2f}".format),
        *(_saved(name) for name in hardware if frame[f"saving_{name}"].notna().any()),
        *(Column(f"over_{name}", name, "{:.2f}".format, group=f"over {against}") for name in shown),
    ]
    caption = captions.sentences(
        "Energy saved against the dense model [%] under hardware profiles, causal convention.",
        f"Over {against}: energy over that of the row {against} under the same profile.",
        "T, b: timesteps, or bits of an integer.",
        "Rates and perplexity: of the model that was run; other models by their dimensions.",
        captions.perplexity(rows[0]),
    )
    sections = list(zip(frame["model"], frame["workload"], strict=True))
    return Sheet(frame, columns, caption, sections, [False] * len(frame))


def _workloads(row: Row) -> list[tuple[str, str, int, Mapping[str, Any]]]:
    """The costs of a row by model, phase and tokens, causal convention."""
    result, settings = row.result, row.run.settings
    tokens = settings.energy.tokens or settings.evaluation.length
    found: list[tuple[str, str, int, Mapping[str, Any]]] = [
        (result["model"], "prefill", tokens, result)
    ]
    found.append((result["model"], "decode", tokens, result["decode"]))
    for name, costs in result["models"].items():
        found += [(name, phase, tokens, each) for phase, each in costs["causal"].items()]
    return found


def _entry(
    row: Row,
    model: str,
    phase: str,
    tokens: int,
    costs: Mapping[str, Any],
    hardware: Sequence[str],
) -> dict[str, Any]:
    (corpus, *_) = row.run.settings.evaluation.corpora
    result = row.result
    ratio = {"ratio": "", "low": "_low", "high": "_high"}
    return {
        "model": model,
        "workload": f"{phase} {tokens}",
        "row": row_name(result),
        "timesteps": result["timesteps"],
        **{name: result.get(f"{RATIO}{corpus}{end}") for name, end in ratio.items()},
        "spikes_per_value": result["spikes_per_value"],
        **{start + name: costs.get(start + name) for start in UNDER for name in hardware},
        "environment": environment(result),
    }


def _over(frame: pd.DataFrame, against: str, hardware: Sequence[str]) -> pd.DataFrame:
    """With what every row costs over the row `against` of its model and workload."""
    numbers = [*NUMBERS, *(start + name for start in UNDER for name in hardware)]
    frame = frame.astype(dict.fromkeys(numbers, "float64") | {"timesteps": "Int64"})
    theirs = frame[frame["row"] == against].set_index(["model", "workload"])
    if theirs.empty:
        raise InputError(f"no row is called {against}: the table compares with it")
    places = pd.MultiIndex.from_frame(frame[["model", "workload"]])
    for name in hardware:
        base = theirs[f"energy_J_{name}"].reindex(places).to_numpy()
        frame[f"over_{name}"] = frame[f"energy_J_{name}"] / base
    return frame


def _saved(profile: str) -> Column:
    return Column(
        f"saving_{profile}", profile, lambda saved: f"{100 * saved:.1f}", group="saved", spare=1
    )
