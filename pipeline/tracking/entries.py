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
from pipeline.results.folders import ENDED, FAILED, MULTIRUN, RunFolder
from pipeline.results.rows import distinct, result_frame, sweep_results
from pipeline.run.measured import KINDS, PARTS
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
    """A job that has ended, with its pictures; of a failed one why, and what its configuration says."""
    if job.outcome.name == FAILED:
        return _failed_entry(job)
    result, run, evaluation = job.result, job.result["run"], job.result["evaluation"]
    axes = result["axes"] | _read_axes(job)
    computed = json.dumps([axes["model"], result["label"], result["keys"]], sort_keys=True)
    measures = {
        name: str(value)
        for name, value in leaves(evaluation).items()
        if not name.endswith((".perplexity", ".nll"))
    }
    return Entry(
        name=f"{axes['model']} {result['label']}",
        identity=identity(job),
        started=run["started"],
        ended=run["ended"],
        tags={COMPUTATION: hashlib.sha256(computed.encode()).hexdigest()}
        | _tags(job, axes, run["overrides"])
        | measures
        | _origin(run)
        | _table("per_site.json"),
        params=axes | _fields(job.config),
        result={k: v for k, v in result.items() if k not in (*NO_METRIC, *axes)}
        | {f"nll_{corpus}": metrics["nll"] for corpus, metrics in evaluation.items()},
        inputs=_inputs(job),
        artifacts={
            "config.yaml": OmegaConf.to_yaml(job.config, resolve=True),
            "per_site.json": job.sites.to_json(orient="split", index=False),
            **{name: job.path / name for name in (KINDS, PARTS)},
            **{f"figures/{path.name}": path for path in pictures},
        },
    )


def _failed_entry(job: RunFolder) -> Entry:
    axes, label, params = _configured(job)
    config, error = job.path / ".hydra/config.yaml", _cut(job.failure["error"])
    return Entry(
        name=f"{axes['model']} {label}",
        identity=identity(job),
        started=config.stat().st_mtime,
        ended=job.outcome.stat().st_mtime,
        status="FAILED",
        tags=_tags(job, axes, job.failure["overrides"])
        | {"error": error, "mlflow.note.content": error},
        params=axes | params,
        artifacts={file.name: file for file in (config, *sorted(job.path.glob("*.log")))},
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
    end, jobs = folder.read(ENDED), folder.jobs
    failed = {job.path.name: job.failure for job in jobs if job.failure}
    results = sweep_results(folder.path) if folder.finished else {}
    axes = [result["axes"] | _read_axes(job) for job, result in results.items()]
    axes += [_configured(job)[0] for job in jobs if job.failure and job not in results]
    tags = {
        key: ", ".join(dict.fromkeys(str(each[key]) for each in axes if key in each))
        for key in dict.fromkeys(key for each in axes for key in each)
    }
    tags |= {"experiment": folder.experiment or "none"}
    artifacts: dict[str, str | Path] = {
        f"{'figures' if path.suffix in ('.png', '.pdf') else 'tables'}/{path.name}": path
        for path in files
    }
    artifacts["multirun.yaml"] = folder.path / MULTIRUN
    if failed:
        artifacts["failed.json"] = json.dumps(failed, indent=1)
    if results:
        frame = result_frame(distinct(results.values()))
        artifacts["table.json"] = frame.to_json(orient="split", index=False)
        table = [p.read_text() for p in files if p.name == f"{naming.run_name(folder)}.md"]
        tags |= _origin(next(iter(results.values()))["run"]) | _table("table.json")
        tags |= {"mlflow.note.content": _cut("".join(table))}
    names = (folder.experiment or "sweep", tags.get("model"), folder.path.name)
    return replace(
        opened_sweep(folder),
        name=" ".join(filter(None, names)),
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
        return settings.axes | _read_axes(job), settings.name, _fields(config)
    except Exception:  # the configuration may be what the job has failed of
        axes = {key: job.choices[key] for key in ("model", "coding", "transform")}
        with suppress(Exception):
            axes["model"] = instantiate(config.model).name
        for key in ("timesteps", "grains"):
            with suppress(Exception):
                axes[key] = config.coding[key]
        return axes, str(config.row or axes["coding"]), {}


def _read_axes(job: RunFolder) -> dict[str, Any]:
    """Axes that the configuration of a job has beside those of its result."""
    read = job.config.evaluation
    names = {"evaluation": ", ".join(read.corpora), "tasks": ", ".join(read.tasks)}
    return {"sites": job.choices["sites"]} | names


def _fields(config: DictConfig) -> dict[str, Any]:
    """Every field of the groups that determine a result, by group.field."""
    whole: Any = OmegaConf.to_container(config, resolve=True)
    fields = leaves({group: whole[group] for group in GROUPS})
    return {name: fields[name] for name in fields if "._" not in name}


def _tags(job: RunFolder, axes: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    tags = {name: str(axes[name]) for name in GROUPED if name in axes}
    experiment = RunFolder(job.path.parent).experiment or "none"
    return tags | {"experiment": experiment, "overrides": " ".join(overrides)}


def _table(name: str) -> dict[str, str]:
    """The tag by which the dashboard shows a json file as a table."""
    return {"mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"}])}


def _origin(run: Mapping[str, Any]) -> dict[str, str]:
    """Source revision, versions and machine; the dashboard has a column for the revision."""
    origin = leaves({"git": run["git"], "version": run["versions"], "machine": run["machine"]})
    origin |= {"mlflow.source.name": "python -m pipeline", "mlflow.source.type": "LOCAL"}
    origin |= {"mlflow.source.git.commit": run["git"]["revision"]}
    return {name: str(value) for name, value in origin.items() if value is not None}


def _inputs(job: RunFolder) -> list[DatasetInput]:
    """The texts and questions that a job has read, by the keys of their tokens."""
    calibration, evaluation = job.config.calibration, job.config.evaluation
    read = [(name, "evaluation", f"evaluation ppl_{name}") for name in evaluation.corpora]
    if "capture" in job.result["keys"]:
        read.insert(0, (calibration.corpus, "calibration", "capture"))
    inputs = []
    for name, context, stage in read:
        corpus: Any = entry("corpus", name, instantiate(job.config.corpus[name], _convert_="all"))
        origin, spec = corpus.origin(context), job.config[context]
        kind = ORIGINS.get(type(origin), "local")
        source = {"uri": str(origin)} if kind == "local" else asdict(origin)
        shape = {"windows": spec.windows, "length": spec.length}
        digest = manifest.read(job.artifact(stage))["inputs"]["tokens"]
        inputs.append(dataset(name, context, digest, kind, source, shape))
    for name in evaluation.tasks:
        task = {"task": name, "path": job.config.tasks[name].get("path")}
        shape = {"items": evaluation["items"]}  # .items is the method
        digest = manifest.read(job.artifact(f"evaluation acc_{name}"))["inputs"]["data"]
        inputs.append(dataset(name, "evaluation", digest, "questions", task, shape))
    return inputs


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
