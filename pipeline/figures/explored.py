"""What a page to explore shows of runs: a record a row, its errors by layer, its joules by part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.figures.comparisons import series_names
from pipeline.figures.hardware import PHASES
from pipeline.figures.kept import Jobs
from pipeline.results import uncertainty
from pipeline.results.columns import (
    DIVERGED,
    UNDEFINED,
    excess,
    perplexity,
    scientific,
    small,
)
from pipeline.results.rows import RATIO, measures, profiles, row_name
from pipeline.run.jobs import command

DIGITS = 4  # of numbers that are drawn
LEAST = 0.01  # percent above the dense model: where those stand that are no worse
ABOVE = 2.0  # times the largest perplexity that did not diverge: where those stand that did
Records = list[dict[str, Any]]


def records(jobs: Jobs) -> dict[str, Records]:
    """The data sets of a page: `rows`, a record a run, `layers` by run, role and layer, and `parts` by
    run, phase, profile and part. `row` is the name of a run that no other has."""
    results = list(jobs.values())
    names = unique_names(results)
    pairs = list(zip(names, jobs, strict=True))
    return {
        "rows": rows(names, results),
        "layers": [each for name, job in pairs for each in layers(name, job.sites)],
        "parts": [each for name, job in pairs for each in parts(name, job.parts)],
    }


def unique_names(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The row of every result with its T, its transform, and its model where there are several; what is
    alike is numbered."""
    several = len({result["model"] for result in results}) > 1
    names = []
    for series, result in zip(series_names(results), results, strict=True):
        t, transform = result.get("timesteps"), result.get("transform")
        parts = [series, f"T={t}" * (t is not None)]
        parts += [str(transform) * (transform not in (None, "none")), result["model"] * several]
        names.append(" ".join(filter(None, parts)))
    alike, seen = Counter(names), Counter[str]()
    for place, name in enumerate(names):
        if alike[name] > 1:
            seen[name] += 1
            names[place] = f"{name} ({seen[name]})"
    return names


def rows(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> Records:
    """The records of runs: names, T, n, steps, spikes a value, the command, perplexities by text under
    `ppl` and energies by phase and profile under `energy`."""
    corpora, _ = measures(name for result in results for name in result)
    hardware = profiles(dict.fromkeys(name for result in results for name in result))
    ppl = {corpus: perplexities(corpus, results) for corpus in corpora}
    made = []
    for place, (name, result) in enumerate(zip(names, results, strict=True)):
        spikes, steps = result.get("spikes_per_value"), result.get("timesteps")
        made.append(
            {
                "row": name,
                "place": place,
                "method": row_name(result),
                "model": result["model"],
                "coding": result["coding"],
                "transform": result.get("transform") or "none",
                "dense": result["coding"] == "dense",
                "T": steps,
                "steps": result.get("steps") or steps,
                "n": UNDEFINED if result.get("grains") is None else str(result["grains"]),
                "spikes": UNDEFINED if spikes is None else f"{spikes:.3f}",
                "command": command((result.get("run") or {}).get("overrides", ())),
                "ppl": {corpus: each[place] for corpus, each in ppl.items()},
                "energy": {
                    phase: energies(result.get(key, {}) if key else result, hardware)
                    for key, phase in PHASES.items()
                },
            }
        )
    return made


def perplexities(corpus: str, results: Sequence[Mapping[str, Any]]) -> Records:
    """Of every run the perplexity of a text, and its `excess` over the dense model's in percent, as they
    are drawn with their bounds, and as a table shows them.

    Bounds are those of the 95 % interval of the ratio to the dense model, of a perplexity times the dense
    model's; else a standard error away. One that diverged is drawn above all others, without bounds.
    """
    name, ratio = f"ppl_{corpus}", RATIO + corpus
    columns = [name, f"{name}_se", f"{name}_spread", "replicates", ratio]
    columns += [f"{ratio}_low", f"{ratio}_high"]
    frame = pd.DataFrame([{key: r.get(key) for key in columns} for r in results], columns=columns)
    frame = frame.astype("float64")
    low, high = uncertainty.interval(frame, name, ratio)
    value, error, over = frame[name], frame[f"{name}_se"], frame[ratio]
    base, broken = value / over, ~(value <= DIVERGED)
    heights = {
        "perplexity": (
            value,
            (low * base).fillna(value - error),
            (high * base).fillna(value + error),
        ),
        "excess": [(100 * (each - 1)).clip(lower=LEAST) for each in (over, low, high)],
    }
    drawn = {key: _drawn(each, broken) for key, each in heights.items()}
    shown = zip(value, error, over, frame[f"{ratio}_low"], frame[f"{ratio}_high"], strict=True)
    return [
        {
            **{key: each[place] for key, each in drawn.items()},
            "known": results[place].get(name) is not None,
            "diverged": bool(broken[place]),
            "shown": _ppl(ppl, se),
            "versus": UNDEFINED if math.isnan(ratios[0]) else excess(*ratios),
        }
        for place, (ppl, se, *ratios) in enumerate(shown)
    ]


def _drawn(heights: Sequence[pd.Series], broken: pd.Series) -> list[dict[str, float]]:
    """Heights with bounds where they have them, those of broken runs above all others."""
    value, low, high = heights
    sane = value[~broken].dropna()
    ceiling = ABOVE * float(sane.max()) if len(sane) else DIVERGED
    made = []
    for y, below, above, lost in zip(value, low, high, broken, strict=True):
        each = {"drawn": ceiling if lost and not math.isnan(y) else y}
        if not lost and below > 0 and math.isfinite(above):
            each |= {"low": below, "high": above}
        made.append({key: number for key, number in _rounded(each).items() if number is not None})
    return made


def _ppl(value: float, error: float) -> str:
    if math.isnan(value):
        return UNDEFINED
    return perplexity(value, error) if math.isfinite(value) else "infinite"


def energies(costs: Mapping[str, Any], hardware: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Joules of a pass and what they save under every profile that has a price for it."""
    made = {}
    for profile in hardware:
        joules, saving = costs.get(f"energy_J_{profile}"), costs.get(f"saving_{profile}")
        if joules is not None:
            saved = UNDEFINED if saving is None else f"{100 * saving:.1f} %"
            made[profile] = _rounded({"J": joules}) | {"shown": _joules(joules), "saving": saved}
    return made


def _joules(value: float) -> str:
    return f"{small(value, 3) if value < 1e4 else scientific(value, 2)} J"


def layers(name: str, sites: pd.DataFrame) -> Records:
    """Logarithm of the NMSE, its mean where a layer has several sites of a role, spikes and values by
    role and layer; the head is a layer behind the last."""
    if not sites["nmse"].notna().any() and not sites["spikes"].notna().any():
        return []
    last = max(int(sites["layer"].max()), -1) + 1
    log = np.log(sites["nmse"].where(sites["nmse"] > 0))
    frame = sites.assign(error=log, layer=sites["layer"].where(sites["layer"] >= 0, last))
    frame["values"] = frame["values"].where(frame["spikes"].notna())
    sums = frame.groupby(["role", "layer"], sort=False).agg(
        error=("error", "mean"),
        spikes=("spikes", lambda each: each.sum(min_count=1)),
        values=("values", lambda each: each.sum(min_count=1)),
    )
    return [
        {"row": name, "role": each["role"], "layer": int(each["layer"])}
        | _rounded({key: each[key] for key in ("error", "spikes", "values")})
        for each in sums.reset_index().to_dict("records")
    ]


def parts(name: str, joules: pd.DataFrame) -> Records:
    """Joules by phase, profile and part of the model that was run, causal convention."""
    mine = joules[(joules["convention"] == "causal") & joules["model"].isna()]
    sums = mine.groupby(["phase", "profile", "part"], sort=False)["J"].sum(min_count=1).dropna()
    places = ("phase", "profile", "part")
    return [
        {"row": name} | {place: each[place] for place in places} | _rounded({"J": each["J"]})
        for each in sums.reset_index().to_dict("records")
    ]


def _rounded(numbers: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers with as many digits as a picture shows; null where there is none."""
    return {
        name: float(f"{value:.{DIGITS}g}") if _finite(value) else None
        for name, value in numbers.items()
    }


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)
