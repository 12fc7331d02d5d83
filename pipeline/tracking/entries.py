"""What is logged of a job or a sweep, from its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from pipeline.results import naming
from pipeline.results.folders import ENDED, FAILED, KINDS, MULTIRUN, RunFolder
from pipeline.results.rows import distinct, result_frame, sweep_results
from pipeline.run.settings import entry
from pipeline.run.shipped import leaves
from pipeline.store import manifest
from pipeline.tracking.database import COMPUTATION, Entry
from stages.model.sources import HubText, PackageFile

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

# Groups of the configuration whose fields are params by group.field.
GROUPS = ("calibration", "coding", "distribution", "evaluation", "fitting", "transform")
GROUPED = ("coding", "row", "transform", "model")  # tags by which the dashboard groups jobs
NO_METRIC = ("run", "axes", "evaluation", "label", "environments", "bootstrap")  # of result.json
ORIGINS = {PackageFile: "package", HubText: "hub"}
NOTE = 7500  # characters of a description; MLflow cuts it at 8000
DIGEST = 36  # characters of a data set's digest, MLflow's limit


def job_entry(job: RunFolder, pictures: Sequence[Path]) -> Entry:
    """A finished job with its pictures."""
    result, config = job.result, job.config
    run, evaluation = result["run"], result["evaluation"]
    axes = _axes(job, result["axes"])
    computed = json.dumps([axes["model"], result["label"], result["keys"]], sort_keys=True)
    measures = {
        f"{corpus}.{name}": str(value)
        for corpus, metrics in evaluation.items()
        for name, value in metrics.items()
        if name not in ("perplexity", "nll")
    }
    return Entry(
        name=f"{axes['model']} {result['label']}",
        identity=identity(job),
        started=run["started"],
        ended=run["ended"],
        tags={COMPUTATION: hashlib.sha256(computed.encode()).hexdigest()}
        | _tags(job, axes, run["overrides"])
        | measures
        | _origin(result)
        | _table("per_site.json"),
        params=axes | _fields(config),
        result={k: v for k, v in result.items() if k not in (*NO_METRIC, *axes)}
        | {f"nll_{corpus}": metrics["nll"] for corpus, metrics in evaluation.items()},
        inputs=_inputs(job),
        artifacts={
            "config.yaml": OmegaConf.to_yaml(config, resolve=True),
            "per_site.json": job.sites.to_json(orient="split", index=False),
            KINDS: job.path / KINDS,
            **{f"figures/{path.name}": path for path in pictures},
        },
    )


def failed_entry(job: RunFolder) -> Entry:
    """A failed job: why it failed, and what its configuration says."""
    axes, label, params = _configured(job)
    config, error = job.path / ".hydra/config.yaml", _cut(job.failure["error"])
    return Entry(
        name=" ".join(str(part) for part in (axes.get("model"), label) if part) or "failed",
        identity=identity(job),
        started=config.stat().st_mtime,
        ended=(job.path / FAILED).stat().st_mtime,
        status="FAILED",
        tags=_tags(job, axes, job.failure["overrides"])
        | {"error": error, "mlflow.note.content": error},
        params=axes | params,
        artifacts={
            "config.yaml": config.read_text(),
            **{path.name: path for path in sorted(job.path.glob("*.log"))},
        },
    )


def opened_sweep(folder: RunFolder) -> Entry:
    """A sweep that has begun: its name alone."""
    return Entry(
        name=f"{folder.experiment or 'sweep'} {folder.path.name}",
        identity={"kind": "sweep", "sweep": folder.path.name},
        started=(folder.path / MULTIRUN).stat().st_mtime,
        ended=0,
    )


def sweep_entry(folder: RunFolder, files: Sequence[Path]) -> Entry:
    """A sweep that has ended, with its tables and figures; the main table is its description.

    All of it can be logged again, as params could not: a sweep may be closed before its end.
    """
    end, opened = folder.read(ENDED), opened_sweep(folder)
    failed = {job.path.name: job.failure for job in folder.jobs if job.failure}
    results = sweep_results(folder.path) if folder.finished else {}
    axes = [_axes(job, result["axes"]) for job, result in results.items()]
    axes += [_configured(job)[0] for job in folder.jobs if job.failure and job not in results]
    artifacts: dict[str, str | Path] = {"multirun.yaml": (folder.path / MULTIRUN).read_text()}
    if failed:
        artifacts["failed.json"] = json.dumps(failed, indent=1)
    tags = {
        key: ", ".join(dict.fromkeys(str(each[key]) for each in axes if key in each))
        for key in dict.fromkeys(key for each in axes for key in each)
    }
    tags |= {"experiment": folder.experiment or "none"}
    if results:
        frame = result_frame(distinct(results.values()))
        artifacts["table.json"] = frame.to_json(orient="split", index=False)
        table = [p.read_text() for p in files if p.name == f"{naming.run_name(folder)}.md"]
        tags |= _origin(next(iter(results.values()))) | _table("table.json")
        tags |= {"mlflow.note.content": _cut("".join(table))}
    for path in files:
        group = "figures" if path.suffix in (".png", ".pdf") else "tables"
        artifacts[f"{group}/{path.name}"] = path
    return replace(
        opened,
        name=" ".join(
            filter(None, (folder.experiment or "sweep", tags.get("model"), folder.path.name))
        ),
        ended=end["ended"],
        status=end["status"],
        tags=tags,
        result={"jobs": len(results), "failed": len(failed)},
        artifacts=artifacts,
    )


def identity(job: RunFolder) -> dict[str, str]:
    """The tags that only the run of this job has."""
    return {"sweep": job.path.parent.name, "job": job.path.name}


def _configured(job: RunFolder) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Axes, label and params of a job without a result, as far as its configuration can be read."""
    config = job.config
    try:
        settings: Any = instantiate(config)
        return _axes(job, settings.axes), settings.name, _fields(config)
    except Exception:  # the configuration may be what the job has failed of
        axes: dict[str, Any] = {}
        for key in ("model", "coding", "transform"):
            axes[key] = job.choices[key]
            with suppress(Exception):
                axes[key] = instantiate(config[key], _convert_="all").name
        for key in ("timesteps", "grains"):
            with suppress(Exception):
                axes[key] = config.coding[key]
        return axes, str(config.row or axes["coding"]), {}


def _axes(job: RunFolder, axes: Mapping[str, Any]) -> dict[str, Any]:
    """What sweeps vary, by short names."""
    evaluation = job.config.evaluation
    return {
        **axes,
        "sites": job.choices["sites"],
        "evaluation": ", ".join(evaluation.corpora),
        "tasks": ", ".join(evaluation.tasks),
    }


def _fields(config: DictConfig) -> dict[str, Any]:
    """Every field of the groups that determine a result, by group.field."""
    whole: Any = OmegaConf.to_container(config, resolve=True)
    groups = {group: whole[group] for group in GROUPS}
    return {n: v for n, v in leaves(groups).items() if not n.rpartition(".")[2].startswith("_")}


def _tags(job: RunFolder, axes: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    tags = {name: str(axes[name]) for name in GROUPED if name in axes}
    experiment = RunFolder(job.path.parent).experiment or "none"
    return tags | {"experiment": experiment, "overrides": " ".join(overrides)}


def _table(name: str) -> dict[str, str]:
    """The tag by which the dashboard shows a json file as a table."""
    return {"mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"}])}


def _origin(result: Mapping[str, Any]) -> dict[str, str]:
    """Source revision, versions and machine; the dashboard has a column for the revision."""
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


def _inputs(job: RunFolder) -> list[DatasetInput]:
    """The texts and questions that a job has read, by the keys of their tokens."""
    calibration, evaluation = job.config.calibration, job.config.evaluation
    inputs = []
    read = [
        (name, "evaluation", evaluation, f"evaluation ppl_{name}") for name in evaluation.corpora
    ]
    if "capture" in job.result["keys"]:
        read.insert(0, (calibration.corpus, "calibration", calibration, "capture"))
    for name, context, spec, stage in read:
        given = instantiate(job.config.corpus[name], _convert_="all")
        corpus: Any = entry("corpus", name, given)
        origin = corpus.origin(context)
        kind = ORIGINS.get(type(origin), "local")
        source = {"uri": str(origin)} if kind == "local" else asdict(origin)
        shape = {"windows": spec.windows, "length": spec.length}
        inputs.append(dataset(name, context, _read(job, stage, "tokens"), kind, source, shape))
    for name in evaluation.tasks:
        digest = _read(job, f"evaluation acc_{name}", "data")
        task = {"task": name, "path": job.config.tasks[name].get("path")}
        shape = {"items": evaluation["items"]}  # .items is the method
        inputs.append(dataset(name, "evaluation", digest, "questions", task, shape))
    return inputs


def _read(job: RunFolder, stage: str, name: str) -> str:
    """The key of an input of a stage's artifact."""
    return str(manifest.read(job.artifact(stage))["inputs"][name])


def dataset(
    name: str,
    context: str,
    digest: str,
    kind: str,
    source: Mapping[str, Any],
    profile: Mapping[str, Any],
) -> DatasetInput:
    """A data set that a run has read: `context` says what for, `digest` which content."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    texts = json.dumps(dict(source)), None, json.dumps(dict(profile))
    return DatasetInput(
        Dataset(name, digest[:DIGEST], kind, *texts), [InputTag("mlflow.data.context", context)]
    )


def _cut(text: str) -> str:
    """As many lines of a text as a description can hold."""
    if len(text) <= NOTE:
        return text
    return f"{text[:NOTE].rpartition(chr(10))[0]}\n\nThe whole table is among the artifacts."
