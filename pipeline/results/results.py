"""What a run measured: its row in every table, its per-site table, and where each number lies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stages.codings.base import Coding
from stages.energy import by_kind
from stages.evaluation import Perplexity

if TYPE_CHECKING:
    from pipeline.run.runner import Run
    from pipeline.store.store import Artifact

LIBRARIES = ("torch", "transformers")
# The stages that run a model; the others compute on the processor with what these have left.
RUNNING = ("prefix", "capture", "statistics", "patching", "evaluation")
CONVERSION = ("prefix", "capture", "distribution", "statistics", "fitting", "patching")


def energy_by_kind(run: Run) -> pd.DataFrame:
    """Cost of every kind of operation by convention and phase: what became additions, what stays."""
    return by_kind(pd.read_parquet(run.artifacts["energy"].path / "operations.parquet"))


def per_site(run: Run, perplexities: dict[str, Perplexity]) -> pd.DataFrame:
    """Counters of the first corpus and the error on held-out values, one row a site."""
    frame = perplexities[run.settings.evaluation.corpora[0]].counters
    frame = frame.drop(columns=["error", "power"])
    frame["spikes_per_value"] = frame["spikes"] / frame["values"]
    frame["nmse"] = np.nan
    if "patching" in run.artifacts:
        measured = pd.read_parquet(run.artifacts["patching"].path / "sites.parquet")
        frame["nmse"] = frame["site"].map(measured.set_index("site")["nmse"])
    return frame


def collect(run: Run) -> tuple[dict[str, Any], pd.DataFrame]:
    """What the artifacts of a whole run hold: the row of result.json, and the per-site table."""
    evaluation = run.settings.evaluation
    perplexities = {
        name: Perplexity.load(run.artifacts[f"evaluation ppl_{name}"].path)
        for name in evaluation.corpora
    }
    accuracies = {
        name: _json(run, f"evaluation acc_{run.settings.tasks[name].name}", "metrics.json")
        for name in evaluation.tasks
    }
    sites = per_site(run, perplexities)
    energy = _json(run, "energy", "summary.json")
    return _result(run, perplexities, accuracies, energy, sites), sites


def _json(run: Run, label: str, name: str) -> dict[str, Any]:
    return dict(json.loads((run.artifacts[label].path / name).read_text()))


def _result(
    run: Run,
    perplexities: dict[str, Perplexity],
    accuracies: dict[str, dict[str, Any]],
    energy: dict[str, Any],
    sites: pd.DataFrame,
) -> dict[str, Any]:
    """Everything measured, as result.json keeps it: the columns of tables first."""
    row = {k: run.settings.axes[k] for k in ("model", "transform", "coding", "grains", "timesteps")}
    row |= _kind(run.settings.coding)
    row |= {f"ppl_{name}": p.metrics["perplexity"] for name, p in perplexities.items()}
    for name, score in accuracies.items():
        row[f"acc_{name}"] = score["value"]
        row |= {f"acc_{name}_{part}": score[part] for part in ("stderr", "n")}
    coded = sites.dropna(subset=["acs"])
    fanout = float(coded["macs"].sum())
    row["nmse"] = geometric_mean(sites["nmse"])
    row["spikes_per_value"] = float(coded["acs"].sum()) / fanout if fanout else None
    totals, savings = energy["total"], energy["saving"]
    flat = {
        convention: {
            phase: {**totals[convention][phase], "saving": savings[convention][phase]}
            for phase in totals[convention]
        }
        for convention in totals
    }
    row |= flat["causal"]["prefill"]
    seconds = {stage: artifact.seconds for stage, artifact in run.artifacts.items()}
    converted = [t for stage, t in seconds.items() if stage.partition(" ")[0] in CONVERSION]
    row["conversion_s"] = round(sum(converted), 3) if converted else None
    if "evaluation anytime" in run.artifacts:
        row["anytime"] = _json(run, "evaluation anytime", "anytime.json")
    return row | {
        "label": run.settings.name,
        "fingerprint": run.model.fingerprint[:8],
        "axes": run.settings.axes,
        "paper": flat["paper"]["prefill"],
        "decode": flat["causal"]["decode"],
        "paper_decode": flat["paper"]["decode"],
        "evaluation": {name: p.metrics for name, p in perplexities.items()},
        "seconds": seconds,
        "hits": {stage: artifact.hit for stage, artifact in run.artifacts.items()},
        "keys": {stage: artifact.key for stage, artifact in run.artifacts.items()},
        "environments": environments(run.artifacts),
    }


def environments(artifacts: Mapping[str, Artifact]) -> list[dict[str, str | None]]:
    """The distinct minor versions and devices that have computed these artifacts by label.

    Stages that run no model have no device, and count where their versions are like no other's.
    """
    found: list[dict[str, str | None]] = []
    running = {label: label.partition(" ")[0] in RUNNING for label in artifacts}
    for label in sorted(artifacts, key=lambda each: (not running[each], each)):
        built = artifacts[label].manifest
        place = {name: _minor(built["versions"].get(name)) for name in LIBRARIES}
        if running[label]:
            place["device"] = built["machine"]["device"]
        if not any(place.items() <= other.items() for other in found):
            found.append(place)
    return found


def _minor(version: str | None) -> str | None:
    return None if version is None else ".".join(version.split("+")[0].split(".")[:2])


def _kind(coding: Coding) -> dict[str, Any]:
    """T + log2 of the neurons an activation chooses from, how spikes are counted, whether trained."""
    if not coding.converts:
        return {"bits": None, "convention": None, "trained": None}
    choice = math.log2(coding.grains) if coding.gate_comparisons else 0.0
    return {
        "bits": coding.timesteps + choice,
        "convention": coding.convention,
        "trained": coding.trained,
    }


def geometric_mean(values: pd.Series) -> float | None:
    """Of the values that are known; None without any."""
    known = values.dropna()
    if known.empty:
        return None
    return float(np.exp(np.log(known.clip(lower=1e-30)).mean()))
