"""`python -m pipeline report NAME`: one page with a study's tables, figures and their origins."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline.results import naming
from pipeline.results.folders import RunFolder
from pipeline.run.shipped import leaves
from pipeline.tables import html, paper
from stages.errors import InputError

if TYPE_CHECKING:
    from pipeline.results.lookup import Row

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


def main(arguments: Sequence[str]) -> int:
    """Writes the page of study=NAME; returns the exit status, 1 for missing cells and bad input."""
    return paper.status(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> None:
    name, mine, rest = paper.parted(arguments, "study")
    study = paper.loaded("study", name, mine)
    if any(a.startswith("experiment=") for a in rest):
        raise InputError(f"got experiment=; the experiments of study={name} are in its file")
    command = paper.command("report", "study", arguments)
    if study.fill:
        paper.log_to_terminal()
    tables = {str(table) for chosen in study.experiments.values() for table in chosen}
    if unknown := sorted(tables - set(paper.names("table"))):
        raise InputError(f"got table {unknown[0]}; choose among {', '.join(paper.names('table'))}")
    rows = looked_up(study, rest, command)
    page = render(study, rows, command)
    model = next(iter(rows.values()))[0].run.settings.axes["model"]
    path = Path(study.folder) / f"{naming.stem(name, [*mine, *rest], model)}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", newline="\n")
    print(f"written: {path}, {len(page) / 1e6:.1f} MB")


def looked_up(study: Any, overrides: Sequence[str], command: str) -> dict[str, list[Row]]:
    """The rows of every experiment; raises Missing with all that is missing of any."""
    from pipeline.results import lookup

    rows, missing = {}, []
    for experiment in study.experiments:
        try:
            chosen = [f"experiment={experiment}", *overrides]
            rows[str(experiment)] = lookup.rows(chosen, study.fill)
        except lookup.Missing as error:
            missing.append(f"{experiment}: {error}")
    if missing:
        again = [] if study.fill else [f"all at once: {command} study.fill=true"]
        raise lookup.Missing("\n".join([*missing, *again]))
    return rows


def render(study: Any, rows: Mapping[str, Sequence[Row]], command: str) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from pipeline.store import provenance

    environment = Environment(
        loader=PackageLoader("pipeline.commands", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["revision"] = revision
    artifacts, environments = paper.origins([row for each in rows.values() for row in each])
    return environment.get_template("report.html.j2").render(
        title=study.title,
        about=study.about,
        command=command,
        tree=provenance.git_state(),
        experiments=[
            experiment(name, study.experiments[name], each, artifacts)
            for name, each in rows.items()
        ],
        environments=environments,
    )


def revision(git: Mapping[str, Any]) -> str:
    """A source revision for people."""
    if git["revision"] is None:
        return "unknown to git"
    return str(git["revision"])[:12] + (" with changes" if git["dirty"] else "")


def experiment(
    name: str,
    tables: Sequence[str],
    rows: Sequence[Row],
    artifacts: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What the page shows of one experiment; `artifacts` are the origins of every key."""
    sheets = {f"{name}-{t}": paper.lay_out(paper.loaded("table", t, []), rows) for t in tables}
    common, different = configurations(rows)
    names = [row.run.settings.name for row in rows]
    texts = [", ".join(f"{key}={value}" for key, value in each.items()) for each in different]
    return {
        "name": name,
        "tables": [
            {"name": key, "caption": sheet.caption, "html": html.styled(sheet, key)}
            for key, sheet in sheets.items()
        ],
        "figures": figures(rows),
        "common": common,
        "differences": html.plain(pd.DataFrame({"row": names, "what differs": texts})),
        "rows": [
            {
                "name": row.run.settings.name,
                "command": row.job.command,
                "cost": f"{sum(row.result['seconds'].values()):.0f} s in {len(row.result['keys'])} steps",
                "steps": html.plain(steps(row.result["keys"], artifacts)),
            }
            for row in rows
        ],
    }


def steps(keys: Mapping[str, str], artifacts: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The steps of a run by their artifacts: what each took, when, and from which source it was built."""
    made = {label: artifacts[key] for label, key in keys.items()}
    return pd.DataFrame(
        {
            "step": list(keys),
            "key": list(keys.values()),
            "seconds": [f"{a['seconds']:.1f}" for a in made.values()],
            "built": [a["created"] for a in made.values()],
            "source": [revision(a["git"]) for a in made.values()],
            "environment": [str(a["environment"] + 1) for a in made.values()],
        }
    )


def figures(rows: Sequence[Row]) -> list[dict[str, str]]:
    """What a sweep over these rows draws, as data URIs with captions."""
    from pipeline.commands import sweep

    with tempfile.TemporaryDirectory() as place:
        folder, into = RunFolder(Path(place, "sweep")), Path(place, "figures")
        for number, row in enumerate(rows):
            _leave(row, RunFolder(folder.path / str(number)))
        into.mkdir()
        drawn = [path for path in sweep.draw(folder, "figure", into) if path.suffix == ".png"]
        return [
            {
                "caption": FIGURES.get(kind := path.stem.removeprefix("figure_"), kind),
                "source": f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
            }
            for path in drawn
        ]


def _leave(row: Row, job: RunFolder) -> None:
    """The files that a job of a sweep leaves, which its figures are drawn from."""
    from omegaconf import OmegaConf

    from pipeline.run import neurobench
    from pipeline.run.measured import energy_tables

    (job.path / ".hydra").mkdir(parents=True)
    OmegaConf.save(row.job.config, job.path / ".hydra/config.yaml")
    measured = row.run.measured
    job.leave(row.result, row.sites, energy_tables(measured), neurobench.read(measured))


def configurations(rows: Sequence[Row]) -> tuple[str, list[dict[str, Any]]]:
    """What all configurations share, as yaml, and of every row the rest by dotted key."""
    from omegaconf import OmegaConf

    whole: list[Any] = [OmegaConf.to_container(row.job.config, resolve=True) for row in rows]
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


if __name__ == "__main__":
    raise SystemExit("nothing was done: the command is `python -m pipeline report`")
