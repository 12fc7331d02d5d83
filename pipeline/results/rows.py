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
from stages.evaluation import ENDINGS

COUNTS = ("grains", "timesteps")
NAMES = ("model", "coding", "row", "setting", "transform")
TEXT = (*NAMES, "trained", "convention", "environment")
# Left out where no row has one.
OPTIONAL = ("row", "setting", "transform", "steps", "bits", "trained", "bound_db", *TEXT[-2:])
# Overrides of a job that are seen in other columns, or that no row needs.
TOLD = {"row", "transform", "timesteps", "coding", "coding.timesteps", "coding.grains"}
TOLD |= {"coding.bits", "model", "model.name", "model.path", "model.hub"}
# Where a result keeps the totals of a convention and phase; the empty name is its top level.
ENERGIES = {
    ("paper", "prefill"): "paper",
    ("causal", "prefill"): "",
    ("paper", "decode"): "paper_decode",
    ("causal", "decode"): "decode",
}
COSTS = ("macs_G", "acs_G", "energy_J", "saving")
SECONDS = ("fitting_s", "conversion_s")
LAST = ("nmse", "bound_db", "convention", "spikes_per_value", *COSTS, *SECONDS, "environment")
# Of every hardware profile, with its name behind it.
UNDER = ("energy_J_", "saving_", "breakeven_")
RATIO = "ratio_"  # of every corpus and task: the number over the dense model's
ERRORS = ENDINGS  # of columns of errors and counts
BESIDE = ("_se", "_low", "_high", "_n")  # of those that others show beside their value


def result_frame(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Collect results, one row each, in the column order of every table.

    Perplexities, each with its ratio to the dense model's, and accuracies come in the order they are
    first met; their errors, and how accuracies compare with the dense model, stand last. What a
    result leaves out or gives as null is missing.
    The name of the row is shown where the other names leave rows of several names alike, and so is the
    setting: overrides of the job that no column shows.
    """
    rows = _set([dict(row) for row in results])
    rows = [row | {"environment": environment(row)} for row in _named(rows)]
    names = dict.fromkeys(name for row in rows for name in row)
    corpora, tasks = measures(names)
    beside = [name for name in _beside(corpora, tasks) if name in names]
    columns = [*_shown(corpora, tasks, profiles(names)), *beside]
    known = {name for row in rows for name, value in row.items() if value is not None}
    columns = [name for name in columns if not _optional(name) or _valued(name) in known]
    frame = pd.DataFrame([{name: row.get(name) for name in columns} for row in rows], None, columns)
    types = {name: _dtype(name) for name in columns if name not in TEXT}
    return frame.astype(types)


def measures(columns: Iterable[Any]) -> tuple[list[str], list[str]]:
    """The texts and the tasks whose numbers are among some columns, in the order they are met."""
    names = [n for n in dict.fromkeys(map(str, columns)) if not n.endswith(ERRORS)]
    corpora = [name.removeprefix("ppl_") for name in names if name.startswith("ppl_")]
    return corpora, [name.removeprefix("acc_") for name in names if name.startswith("acc_")]


def profiles(columns: Iterable[Any]) -> list[str]:
    """The hardware profiles whose energies are among some columns, in the order they are met."""
    return [str(n).removeprefix(UNDER[1]) for n in columns if str(n).startswith(UNDER[1])]


def column_names(
    corpora: Sequence[str], tasks: Sequence[str], hardware: Sequence[str] = ()
) -> list[str]:
    """The columns of a table of runs that are evaluated on these texts and tasks, with the energy under
    these hardware profiles, but for those that others show beside their value."""
    every = (*_shown(corpora, tasks, hardware), *_beside(corpora, tasks))
    return [name for name in every if not name.endswith(BESIDE)]


def _shown(corpora: Sequence[str], tasks: Sequence[str], hardware: Sequence[str]) -> list[str]:
    perplexities = [name for corpus in corpora for name in (f"ppl_{corpus}", RATIO + corpus)]
    accuracies = [f"acc_{task}" for task in tasks]
    measured = [*perplexities, *accuracies, *LAST]
    return [*NAMES, *COUNTS, "steps", "bits", "trained", *measured, *under(hardware)]


def under(hardware: Sequence[str]) -> list[str]:
    """The columns of energy, saving and break-even under every hardware profile."""
    return [start + name for start in UNDER for name in hardware]


def _beside(corpora: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The columns behind the others: errors, how accuracies compare with the dense model's."""
    names = ["replicates"]
    for corpus in corpora:
        names += [f"ppl_{corpus}_se", f"ppl_{corpus}_spread"]
        names += [f"{RATIO}{corpus}_low", f"{RATIO}{corpus}_high"]
    for task in tasks:
        names += [f"acc_{task}{ending}" for ending in ("_se", "_spread", "_n")]
        names += [f"{RATIO}{task}{ending}" for ending in ("", "_low", "_high")]
        names += [f"changed_{task}"]
    return names


def _optional(column: str) -> bool:
    """Whether a table leaves a column out where no row has it, as one of dense rows a comparison."""
    return column in OPTIONAL or column.startswith((RATIO, "changed_"))


def _valued(column: str) -> str:
    """The column whose value decides: an interval stays beside its ratio, also where none has one."""
    ends = column.startswith(RATIO) and column.endswith(("_low", "_high"))
    return column.rpartition("_")[0] if ends else column


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
    rows, results = [], list(results)
    columns = [*COSTS, *under(profiles(dict.fromkeys(n for row in results for n in row)))]
    for result in results:
        for (convention, phase), place in ENERGIES.items():
            totals = result[place] if place else result
            names = {"run": result["label"], "convention": convention, "phase": phase}
            rows.append(names | {name: totals.get(name) for name in columns})
    return pd.DataFrame(rows).astype(dict.fromkeys(columns, "float64"))


def _dtype(column: str) -> str:
    return (
        "Int64"
        if column in (*COUNTS, "steps", "replicates") or column.endswith("_n")
        else "float64"
    )


def sweep_results(sweep_dir: Path) -> dict[RunFolder, dict[str, Any]]:
    """The result of every job below a sweep folder by the job's folder, in the order of the jobs."""
    finished = RunFolder(sweep_dir).finished
    if not finished:
        raise InputError(f"no job below {sweep_dir} has left a result.json: see the jobs' logs")
    results = apart(job.result for job in finished)
    return dict(zip(finished, results, strict=True))
