"""One page of rows, of a study or of runs: figures to explore, tables, configurations, origins."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import OmegaConf

from pipeline.commands import sweep
from pipeline.figures import explored
from pipeline.figures import explorer as interactive
from pipeline.results.folders import RunFolder
from pipeline.results.rows import apart, distinct
from pipeline.run.shipped import leaves
from pipeline.store import provenance, whole
from pipeline.tables import html

FIGURES = {
    "ppl_timesteps": "Perplexity against the number of steps.",
    "ppl_bits": "Perplexity against T + log2 n.",
    "ppl_energy": "Perplexity against energy.",
    "saving_spikes": "Energy saved against spikes a value, under every hardware profile.",
    "energy_parts": "Where the joules go, over what the dense model costs.",
    "levels": "Density of the activations, and of the levels of the codings.",
    "error_per_layer": "Error by layer and role.",
    "spike_rate_per_layer": "Spikes a value by layer and role.",
    "convergence": "Convergence of Algorithm 1.",
}
# Controls of the figures to explore: lists of which several are shown, and what one is chosen of.
LISTS = {"codings": "coding", "timesteps": "T", "transforms": "transform", "models": "model"}
SINGLE = {
    "measure": "measure",
    "profile": "hardware profile",
    "phase": "energy of",
    "corpus": "text",
    "role": "role of sites",
}


def render(
    title: str,
    about: str,
    command: str,
    experiments: Sequence[Mapping[str, Any]],
    environments: Sequence[Mapping[str, Any]],
    folders: Sequence[RunFolder],
) -> str:
    """The page as text; `folders` are those of the runs that are explored."""
    environment = Environment(
        loader=PackageLoader("pipeline.commands", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["revision"] = revision
    return environment.get_template("report.html.j2").render(
        title=title,
        about=about,
        command=command,
        tree=provenance.git_state(),
        explorer=explorer(folders),
        experiments=experiments,
        environments=environments,
    )


def explorer(folders: Sequence[RunFolder]) -> dict[str, Any]:
    """What the section to explore is made of."""
    finished = [job for folder in folders for job in folder.finished]
    results = apart(job.result for job in finished)
    kept = {id(result) for result in distinct(results)}
    pairs = zip(finished, results, strict=True)
    data = explored.records({job: result for job, result in pairs if id(result) in kept})
    return {
        "choices": interactive.choices(data),
        "lists": [*LISTS.items()],
        "single": [*SINGLE.items()],
        "spec": interactive.spec(data),
        "bundle": interactive.bundle(),
    }


def revision(git: Mapping[str, Any]) -> str:
    """A source revision for people."""
    if git["revision"] is None:
        return "unknown to git"
    return str(git["revision"])[:12] + (" with changes" if git["dirty"] else "")


def pictures(folder: RunFolder) -> list[dict[str, str]]:
    """What a sweep draws of the runs in a folder, as data URIs with captions."""
    with tempfile.TemporaryDirectory() as place:
        drawn = [p for p in sweep.draw(folder, "figure", Path(place)) if p.suffix == ".png"]
        return [
            {
                "caption": FIGURES.get(kind := path.stem.removeprefix("figure_"), kind),
                "source": f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
            }
            for path in drawn
        ]


def differences(names: Sequence[str], configs: Sequence[Any]) -> dict[str, str]:
    """The configuration that rows of these names share, as yaml, and a table of what differs."""
    common, different = configurations(configs)
    texts = [", ".join(f"{key}={value}" for key, value in each.items()) for each in different]
    table = pd.DataFrame({"row": list(names), "what differs": texts})
    return {"common": common, "differences": html.plain(table)}


def configurations(configs: Sequence[Any]) -> tuple[str, list[dict[str, Any]]]:
    """What all configurations share, as yaml, and of every one the rest by dotted key."""
    whole: list[Any] = [OmegaConf.to_container(config, resolve=True) for config in configs]
    common = _shared(whole)
    known = leaves(common)
    rest = [{k: v for k, v in leaves(config).items() if k not in known} for config in whole]
    return OmegaConf.to_yaml(OmegaConf.create(common)), rest


def _shared(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The part that nested mappings have in common."""
    shared: dict[str, Any] = {}
    for key, value in configs[0].items():
        members = [config[key] for config in configs if key in config]
        if len(members) == len(configs):
            if all(member == value for member in members):
                shared[key] = value
            elif all(isinstance(m, Mapping) for m in members) and (inner := _shared(members)):
                shared[key] = inner
    return shared


def cost(result: Mapping[str, Any]) -> str:
    """What the artifacts of a row took to make."""
    return f"{sum(result['seconds'].values()):.0f} s in {len(result['keys'])} steps"


def write(page: str, path: Path) -> None:
    """Write a page and say where and how large it is."""
    whole.write(path, page)
    print(f"written: {path}, {path.stat().st_size / 1e6:.1f} MB")
