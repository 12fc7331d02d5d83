"""A finished job's or sweep's folder as an entry of the tracking database."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from hydra.utils import instantiate
from matplotlib import rc_context
from omegaconf import DictConfig, OmegaConf

from pipeline.figures import pictures, sweep
from pipeline.figures.figures import STYLE
from pipeline.figures.levels import artifact, job_config
from pipeline.figures.sweep import experiment
from pipeline.results import folders
from pipeline.results.folders import RECORD
from pipeline.results.rows import distinct, result_frame, sweep_results
from pipeline.run.settings import entry
from pipeline.store import manifest
from pipeline.tracking.entry import Entry, Text
from pipeline.tracking.tracking import COMPUTATION
from stages.model.sources import HubText, PackageFile

if TYPE_CHECKING:
    from pipeline.run.settings import Settings
    from stages.codings.base import Coding
    from stages.text.corpus import Purpose

# Groups of the configuration whose fields are params by group.field.
GROUPS = ("calibration", "coding", "distribution", "evaluation", "fitting", "transform")
FIGURES = (".png", ".pdf")
NOTE = 7500  # characters of a description; MLflow cuts it at 8000


def job_entry(job: Path) -> Entry:
    """What the database is told of a finished job; with pictures unless runtime.figures is false."""
    result = json.loads((job / "result.json").read_text())
    config, sites = job_config(job), pd.read_parquet(job / "per_site.parquet")
    axes = _axes(job, config, result["axes"])
    written = (job / "result.json").stat().st_mtime
    told = ("run", "axes", "evaluation", "label", "environments", *axes)
    return Entry(
        name=f"{axes['model']} {result['label']}",
        identity={"sweep": job.parent.name, "job": job.name},
        started=result["run"].get("started", written),
        ended=result["run"].get("ended", written),
        tags=_tags(job, axes, result["run"]["overrides"]) | _measured_tags(axes, result),
        params=axes | _fields(config),
        result={name: value for name, value in result.items() if name not in told}
        | {f"nll_{name}": metrics["nll"] for name, metrics in result["evaluation"].items()},
        data=_texts(config, result),
        documents={"config.yaml": OmegaConf.to_yaml(config, resolve=True)},
        tables={"per_site.json": sites},
        files={
            "": [job / "energy_by_kind.csv"],
            "figures": _pictures(job, config, result, sites) if config.runtime.figures else [],
        },
    )


def failed_entry(job: Path) -> Entry:
    """What the database is told of a failed job: why it failed, and what its configuration says."""
    failure = json.loads((job / RECORD).read_text())
    axes, label, params = _configured(job)
    model = axes.get("model")
    return Entry(
        name=" ".join(str(part) for part in (model, label) if part) or "failed",
        identity={"sweep": job.parent.name, "job": job.name},
        started=(job / ".hydra/config.yaml").stat().st_mtime,
        ended=(job / RECORD).stat().st_mtime,
        status="FAILED",
        tags=_tags(job, axes, failure["overrides"])
        | {"error": _cut(failure["error"]), "mlflow.note.content": _cut(failure["error"])},
        params=axes | params,
        documents={"config.yaml": (job / ".hydra/config.yaml").read_text()},
        files={"": sorted(job.glob("*.log"))},
    )


def _configured(job: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Axes, label and params of a job without a result, as far as its configuration can be read."""
    config = job_config(job)
    try:
        settings: Settings = instantiate(config)
        return _axes(job, config, settings.axes), settings.name, _fields(config)
    except Exception:  # the configuration may be what the job has failed of
        axes: dict[str, Any] = {}
        for key in ("model", "coding", "transform"):
            axes[key] = _choices(job)[key]
            with suppress(Exception):
                axes[key] = instantiate(config[key], _convert_="all").name
        for key in ("timesteps", "grains"):
            with suppress(Exception):
                axes[key] = config.coding[key]
        return axes, str(config.row or axes["coding"]), {}


def sweep_entry(folder: Path, files: Sequence[Path] | None = None) -> Entry:
    """What the database is told of a sweep: its name, and once it has ended everything.

    `files` are its tables and figures; the main table is also the run's description. All of it can
    be logged again, as params and `log_table` could not: a sweep may be closed before its end.
    """
    name = experiment(folder)
    multirun = folder / "multirun.yaml"
    opened = Entry(
        name=f"{name or 'sweep'} {folder.name}",
        identity={"kind": "sweep", "sweep": folder.name},
        started=multirun.stat().st_mtime,
        ended=0,
    )
    if files is None:
        return opened
    end = json.loads((folder / "ended.json").read_text())
    failed = {
        job: json.loads((job / folders.RECORD).read_text())
        for job in folders.jobs(folder)
        if (job / folders.RECORD).exists()
    }
    results = sweep_results(folder) if folders.finished(folder) else {}
    axes = [_axes(job, job_config(job), r["axes"]) for job, r in results.items()]
    axes += [_configured(job)[0] for job in failed if job not in results]
    documents = {"multirun.yaml": multirun.read_text()}
    if failed:
        documents["failed.json"] = json.dumps(
            {job.name: why for job, why in failed.items()}, indent=1
        )
    tags = {key: _distinct(axis[key] for axis in axes if key in axis) for key in _keys(axes)}
    tags |= {"experiment": name or "none"}
    if results:
        frame = result_frame(distinct(results.values()))
        documents["table.json"] = frame.to_json(orient="split", index=False)
        table = (path.read_text() for path in files if path.name == f"{sweep.name(folder)}.md")
        tags |= _origin(next(iter(results.values())))
        tags |= {
            "mlflow.note.content": _cut("".join(table)),
            "mlflow.loggedArtifacts": json.dumps([{"path": "table.json", "type": "table"}]),
        }
    return replace(
        opened,
        name=" ".join(filter(None, (name or "sweep", tags.get("model"), folder.name))),
        ended=end["ended"],
        status=end["status"],
        tags=tags,
        result={"jobs": len(results), "failed": len(failed)},
        documents=documents,
        files={
            "tables": [path for path in files if path.suffix not in FIGURES],
            "figures": [path for path in files if path.suffix in FIGURES],
        },
    )


def _keys(axes: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for axis in axes for key in axis))


def _choices(job: Path) -> Mapping[str, Any]:
    """The file that each group of a job's configuration is of."""
    choices: Mapping[str, Any] = OmegaConf.load(job / ".hydra/hydra.yaml").hydra.runtime.choices
    return choices


def _axes(job: Path, config: DictConfig, axes: Mapping[str, Any]) -> dict[str, Any]:
    """What sweeps vary, by short names."""
    return {
        **axes,
        "sites": _choices(job)["sites"],
        "evaluation": ", ".join(config.evaluation.corpora),
        "tasks": ", ".join(config.evaluation.tasks),
    }


def _fields(config: DictConfig) -> dict[str, Any]:
    """Every field of the groups that determine a result, by group.field."""
    return {
        f"{group}.{name}": value
        for group in GROUPS
        for name, value in _leaves(OmegaConf.to_container(config[group], resolve=True))
    }


def _leaves(values: Any) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", leaf) for inner, leaf in _leaves(value))
        elif not name.startswith("_"):
            yield name, value


def _tags(job: Path, axes: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """What the dashboard groups and filters by."""
    grouped = ("coding", "row", "transform", "model")
    tags = {name: str(axes[name]) for name in grouped if name in axes}
    return tags | {"experiment": experiment(job.parent) or "none", "overrides": " ".join(overrides)}


def _measured_tags(axes: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    """What was evaluated and where it comes from; jobs of one computation have one hash."""
    computed = json.dumps([axes["model"], result["label"], result["keys"]], sort_keys=True)
    tags = {COMPUTATION: hashlib.sha256(computed.encode()).hexdigest()}
    for corpus, metrics in result["evaluation"].items():
        tags |= {
            f"{corpus}.{k}": str(v) for k, v in metrics.items() if k not in ("perplexity", "nll")
        }
    return tags | _origin(result)


def _origin(result: Mapping[str, Any]) -> dict[str, str]:
    """Source revision, versions and machine; the dashboard shows the revision in its own column."""
    run = result["run"]
    origin = {
        "mlflow.source.name": "python -m pipeline",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": run["git"]["revision"],
        "git.revision": run["git"]["revision"],
        "git.dirty": run["git"]["dirty"],
    }
    origin |= {f"version.{name}": version for name, version in run["versions"].items()}
    origin |= {f"machine.{name}": value for name, value in run["machine"].items()}
    return {name: str(value) for name, value in origin.items() if value is not None}


def _texts(config: DictConfig, result: Mapping[str, Any]) -> list[Text]:
    """The texts and questions that a run read, by the keys of their tokens."""
    calibration, evaluation = config.calibration, config.evaluation
    found = []
    if "capture" in result["keys"]:
        shape = {"windows": calibration.windows, "length": calibration.length}
        digest = _input(config, result, "capture", "tokens")
        found.append(_corpus(config, calibration.corpus, "calibration", digest, shape))
    shape = {"windows": evaluation.windows, "length": evaluation.length}
    for name in evaluation.corpora:
        digest = _input(config, result, f"evaluation ppl_{name}", "tokens")
        found.append(_corpus(config, name, "evaluation", digest, shape))
    for name in evaluation.tasks:
        digest = _input(config, result, f"evaluation acc_{name}", "data")
        task = {"task": name, "path": config.tasks[name].get("path")}
        items = {"items": evaluation["items"]}  # .items is the method
        found.append(Text(name, digest, "evaluation", "questions", task, items))
    return found


def _input(config: DictConfig, result: Mapping[str, Any], stage: str, name: str) -> str:
    """The key of an input of a stage's artifact, from its manifest in the store."""
    folder = Path(config.store.path) / stage.partition(" ")[0] / result["keys"][stage]
    return str(manifest.read(folder)["inputs"][name])


def _corpus(
    config: DictConfig, name: str, context: Purpose, digest: str, shape: Mapping[str, int]
) -> Text:
    corpus: Any = entry("corpus", name, instantiate(config.corpus[name], _convert_="all"))
    origin = corpus.origin(context)
    if isinstance(origin, PackageFile):
        return Text(name, digest, context, "package", asdict(origin), shape)
    if isinstance(origin, HubText):
        return Text(name, digest, context, "hub", asdict(origin), shape)
    return Text(name, digest, context, "local", {"uri": str(origin)}, shape)


def _pictures(
    job: Path, config: DictConfig, result: Mapping[str, Any], sites: pd.DataFrame
) -> list[Path]:
    """Draws the pictures of a job into its folder."""
    if "fitting" not in result["keys"]:
        return []
    coding: Coding = instantiate(config.coding, _convert_="all")
    densities, neurons = (artifact(config, result, stage) for stage in ("distribution", "fitting"))
    drawn = pictures.draw(result["label"], coding, sites, densities, neurons)
    (job / "figures").mkdir(exist_ok=True)
    paths = [job / "figures" / f"{name}.png" for name in drawn]
    with rc_context(STYLE):
        for path, figure in zip(paths, drawn.values(), strict=True):
            figure.savefig(path)
    return paths


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _cut(table: str) -> str:
    """As many lines of a table as a description can hold."""
    if len(table) <= NOTE:
        return table
    whole_lines = table[:NOTE].rpartition("\n")[0]
    return f"{whole_lines}\n\nThe whole table is among the artifacts."
