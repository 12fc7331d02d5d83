"""From the results of a sweep to frames: which rows are shown, in which columns and order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.results.folders import RunFolder
from stages.errors import InputError

COUNTS = ("grains", "timesteps")
NAMES = ("model", "coding", "row", "setting", "transform")
TEXT = (*NAMES, "trained", "convention", "environment")
# Left out where no row has one.
OPTIONAL = ("row", "setting", "transform", "bits", "trained", "convention", "environment")
# Overrides of a job that are seen in other columns, or that no row needs.
TOLD = {"row", "transform", "timesteps", "coding", "coding.timesteps", "coding.grains"}
TOLD |= {"model", "model.name", "model.path", "model.hub"}
# Where a result keeps the totals of a convention and phase; the empty name is its top level.
ENERGIES = {
    ("paper", "prefill"): "paper",
    ("causal", "prefill"): "",
    ("paper", "decode"): "paper_decode",
    ("causal", "decode"): "decode",
}
COSTS = ("macs_G", "acs_G", "energy_J", "saving")
SECONDS = ("fitting_s", "conversion_s")
LAST = ("nmse", "convention", "spikes_per_value", *COSTS, *SECONDS, "environment")
OVER_DENSE = "over_dense_"  # of every corpus: the excess of the perplexity over the dense model's


def result_frame(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Collect results, one row each, in the column order of every table.

    Perplexities and accuracies come in the order they are first met; the standard errors and
    item counts of accuracies stand last. What a result leaves out or gives as null is missing.
    Where a dense row was evaluated like others, these have their excess over its perplexities.
    The name of the row is shown where the other names leave rows of several names alike, and so is the
    setting: overrides of the job that no column shows.
    """
    rows = _set([dict(row) for row in results])
    rows = [row | {"environment": environment(row)} for row in _over_dense(_named(rows))]
    names = list(dict.fromkeys(name for row in rows for name in row))
    accuracy = [name for name in names if name.startswith("acc_")]
    extra = [name for name in accuracy if name.endswith(("_stderr", "_n"))]
    columns = [
        *NAMES,
        *COUNTS,
        *("bits", "trained"),
        *(name for ppl in names if ppl.startswith("ppl_") for name in (ppl, over_dense(ppl))),
        *(name for name in accuracy if name not in extra),
        *LAST,
        *extra,
    ]
    optional = [*OPTIONAL, *(name for name in columns if name.startswith(OVER_DENSE))]
    absent = {name for name in optional if all(row.get(name) is None for row in rows)}
    columns = [name for name in columns if name not in absent]
    frame = pd.DataFrame([{name: row.get(name) for name in columns} for row in rows], None, columns)
    types = {name: _dtype(name) for name in columns if name not in TEXT}
    return frame.astype(types)


def column_names(corpora: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The columns of a table of runs that are evaluated on these texts and tasks."""
    perplexities = [name for corpus in corpora for name in (f"ppl_{corpus}", OVER_DENSE + corpus)]
    accuracies = [f"acc_{task}" for task in tasks]
    return [*NAMES, *COUNTS, "bits", "trained", *perplexities, *accuracies, *LAST]


def over_dense(ppl: str) -> str:
    """The column beside that of a perplexity: its excess over the dense model's, as a fraction."""
    return OVER_DENSE + ppl.removeprefix("ppl_")


def _over_dense(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their excess over the dense row of the same model, transform and windows.

    None where there is no such row, or several that differ.
    """
    dense: dict[Any, set[float]] = {}
    for row in rows:
        if row["coding"] == "dense":
            for ppl, place in _places(row):
                dense.setdefault(place, set()).add(row[ppl])
    apart_rows = []
    for row in rows:
        known = {ppl: dense.get(place, set()) for ppl, place in _places(row)}
        over = {over_dense(p): row[p] / min(d) - 1 for p, d in known.items() if len(d) == 1}
        apart_rows.append(row | over)
    alone = all(row["coding"] == "dense" for row in rows)
    return rows if alone else apart_rows


def _places(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The perplexities of a row that are known, and what another must share to compare with one."""
    named = []
    for name in (n for n in row if n.startswith("ppl_") and row[n] is not None):
        read = (row.get("evaluation") or {}).get(name.removeprefix("ppl_"), {})
        same = (row.get("model"), row.get("transform"), read.get("windows"), read.get("length"))
        named.append((name, (name, *same)))
    return named


def environment(result: Mapping[str, Any]) -> str | None:
    """Where the artifacts behind a result were computed: versions and device, several joined by `; `."""
    parts = []
    for place in result.get("environments") or ():
        libraries = [
            f"{name} {value}" for name, value in place.items() if value and name != "device"
        ]
        parts.append(", ".join([*libraries, place["device"]] if place.get("device") else libraries))
    return "; ".join(dict.fromkeys(parts)) or None


def short_setting(setting: str) -> str:
    """The overrides of a job as a legend has room for: the last part of keys, three digits."""
    keys = re.sub(r"(?:\w+\.)+(\w+=)", r"\1", setting)
    return re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3g}", keys)


def row_name(result: Mapping[str, Any]) -> str:
    """The name of the experiment's row that a result is of; of a conversion by itself its coding's."""
    return str(result.get("row") or result["coding"])


def distinct(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results without repetitions: a sweep over T runs a coding of fixed T again and again.

    Two are the same where every stage has the same artifact, and model and row the same name.
    """
    kept: dict[Any, Mapping[str, Any]] = {}
    for number, result in enumerate(results):
        keys = json.dumps(result.get("keys"), sort_keys=True)
        names = result.get("model"), row_name(result)
        kept.setdefault((names, keys if result.get("keys") else number), result)
    return list(kept.values())


def apart(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results, where models of one name differ with the fingerprint of each behind its name."""
    rows = [dict(result) for result in results]
    prints: dict[Any, set[Any]] = {}
    for row in rows:
        prints.setdefault(row.get("model"), set()).add(row.get("fingerprint"))
    for row in rows:
        if len(prints[row.get("model")]) > 1:
            row["model"] = f"{row['model']} {row.get('fingerprint')}"
            row["axes"] = dict(row.get("axes", {})) | {"model": row["model"]}
    return rows


def _named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their names, if they look alike without them."""
    seen: dict[Any, set[str]] = {}
    for row in rows:
        names = tuple(row.get(name) for name in (*NAMES, *COUNTS) if name != "row")
        seen.setdefault(names, set()).add(row_name(row))
        if row.get("trained") is not None:
            row["trained"] = "yes" if row["trained"] else "no"
    ambiguous = any(len(names) > 1 for names in seen.values())
    return [row | {"row": row_name(row) if ambiguous else None} for row in rows]


def _set(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the overrides that differ between them and that no other column tells."""
    given = [
        {o for o in (row.get("run") or {}).get("overrides", ()) if o.partition("=")[0] not in TOLD}
        for row in rows
    ]
    common = set.intersection(*given) if given else set()
    settings = [" ".join(sorted(each - common)).replace("coding.", "") for each in given]
    return [row | {"setting": setting or None} for row, setting in zip(rows, settings, strict=True)]


def energy_frame(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Collect the energy of every result in both conventions and phases, one row each."""
    rows = []
    for result in results:
        for (convention, phase), place in ENERGIES.items():
            totals = result[place] if place else result
            names = {"run": result["label"], "convention": convention, "phase": phase}
            rows.append(names | {name: totals[name] for name in COSTS})
    return pd.DataFrame(rows).astype(dict.fromkeys(COSTS, "float64"))


def _dtype(column: str) -> str:
    return "Int64" if column in COUNTS or column.endswith("_n") else "float64"


def sweep_results(sweep_dir: Path) -> dict[RunFolder, dict[str, Any]]:
    """The result of every job below a sweep folder by the job's folder, in the order of the jobs."""
    finished = RunFolder(sweep_dir).finished
    if not finished:
        raise InputError(f"no job below {sweep_dir} has left a result.json: see the jobs' logs")
    results = apart(job.result for job in finished)
    return dict(zip(finished, results, strict=True))
