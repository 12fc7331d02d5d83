"""File names of tables, figures and reports: no two configurations share one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.results.folders import RunFolder
from pipeline.results.rows import TOLD, sweep_results

# Overrides of these say where and how results are made, not what they are; a name has its experiment.
CIRCUMSTANCES = re.compile(
    r"[+~]*((store|runtime|tracking|export|hydra)\b|experiment=|(table|study)\.(fill|folder|columns|wide)=)"
)
# What the name of a single run says in other words than an override.
SINGLE = ("model=", "transform=", "coding=", "timesteps=", "coding.timesteps=", "coding.grains=")
LONGEST = 48  # characters of overrides that stay readable in a name; of others their hash is taken


def run_name(folder: RunFolder) -> str:
    """What the tables and figures of a run are called: after its experiment, or else what was asked.

    That is its label, or its model, coding, T and n, or the axes of a sweep.
    """
    first = next(iter(sweep_results(folder.path).values()))
    if folder.experiment is not None:
        return stem(folder.experiment, folder.overrides, first["model"])
    overrides = folder.overrides if folder.swept else (first.get("run") or {}).get("overrides", ())
    return run_stem(first, overrides, folder.swept)


def stem(base: str, overrides: Iterable[str], model: str) -> str:
    """`base`, behind it the model and the overrides that a command line gave beside those of `base`.

    Overrides that a file name has no room or no letters for become a hash: `quickstart`,
    `quickstart_gemma3-270m`, `quickstart_timesteps=8`, `quickstart_<model>_3f2a9c01`.
    """
    given = sorted({each for each in overrides if not CIRCUMSTANCES.match(each)})
    chosen = [each.removeprefix("model=") for each in given if each.startswith("model=")]
    rest = [each for each in given if not each.startswith("model=")]
    if not chosen and any(re.match(r"[+~]*model\.", each) for each in rest):
        chosen = [model]
    return "_".join([base, *(_letters(name) for name in chosen), *_tail(rest)])


def run_stem(result: Mapping[str, Any], overrides: Iterable[str], swept: bool) -> str:
    """The name of a run without an experiment: its row's name, or its model, and what else was asked for.

    `smollm2-135m_gated_T6_n2`, `smollm2-135m_coding=gated+las_timesteps=4+6` of a sweep, and behind
    it all other overrides as those of an experiment, so that no two runs share a name.
    """
    given = sorted({each for each in overrides if not CIRCUMSTANCES.match(each)})
    name = next((each.partition("=")[2] for each in given if each.startswith("row=")), "null")
    model = str(result["model"])
    if name not in ("null", "") and "," not in name:
        rest = [each for each in given if not each.startswith("row=")]
        return stem(_letters(name.strip("'\"")), rest, model)
    known = ("model=",) if swept else SINGLE
    rest = [each for each in given if not each.startswith(known) or (swept and "," in each)]
    parts = [_letters(model)]
    if not swept:
        parts.append(_letters(str(result["coding"])))
        counts = {"T": result.get("timesteps"), "n": result.get("grains")}
        parts += [f"{name}{count}" for name, count in counts.items() if count is not None]
        parts += [t for t in [result.get("transform")] if t not in (None, "none")]
    return "_".join([*parts, *_tail(rest)])


def job_name(job: RunFolder, model: str, label: str, overrides: Iterable[str]) -> str:
    """Label, id and number of a job, what it was asked for beside others of its sweep, and the model.

    What tells it apart comes first, for a narrow column shows no more; paths are left out.
    """
    shared = job.sweep.overrides if job.sweep else ()
    given = [
        o for o in overrides if not CIRCUMSTANCES.match(o) and o not in shared and "/" not in o
    ]
    given = [o.removeprefix("coding.") for o in given if o.partition("=")[0] not in TOLD]
    setting = " ".join(given)
    setting = setting if len(setting) <= LONGEST else f"{setting[: LONGEST - 1]}…"
    run = f"{short_id(job.path.parent.name)}/{job.path.name}"
    return " ".join(filter(None, [label, run, setting, model]))


def short_id(folder: str) -> str:
    """The letters of a run's folder that no other has, without its time; of another folder its name."""
    return re.sub(r"^\d{8}-\d{6}-", "", folder)


def _tail(rest: Sequence[str]) -> list[str]:
    """What a name says of overrides: themselves, or a hash of them."""
    text = "_".join(rest)
    if len(text) <= LONGEST and re.fullmatch(r"[\w.=,-]*", text):
        return [text.replace(",", "+")] * bool(text)
    return [hashlib.sha256("\n".join(rest).encode()).hexdigest()[:8]]


def _letters(name: str) -> str:
    return re.sub(r"[^\w.-]+", "+" if "," in name else "-", name).strip("-+")
