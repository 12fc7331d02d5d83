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
from omegaconf import OmegaConf

from pipeline.results import naming
from pipeline.results.folders import ENDED, FAILED, MULTIRUN, PROCESS, RunFolder
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
METRICS = (".perplexity", ".nll")  # of an evaluation; the rest of it are tags
ORIGINS = {PackageFile: "package", HubText: "hub"}
NOTE = 7500  # characters of a description; MLflow cuts it at 8000
DIGEST = 36  # characters of a data set's digest, MLflow's limit
Values = Mapping[str, Any]


def job_entry(job: RunFolder, pictures: Sequence[Path]) -> Entry:
    """A job that has ended, with its pictures; of a failed one why, and what its configuration says."""
    if job.outcome.name == FAILED:
        return _failed_entry(job)
    result, run, evaluation = job.result, job.result["run"], job.result["evaluation"]
    axes, label, fields = _described(job)
    computed = json.dumps([axes["model"], label, result["keys"]], sort_keys=True)
    measures = {k: str(v) for k, v in leaves(evaluation).items() if not k.endswith(METRICS)}
    return Entry(
        name=naming.job_name(job, axes["model"], label, run["overrides"]),
        identity=identity(job),
        started=run["started"],
        ended=run["ended"],
        tags={COMPUTATION: hashlib.sha256(computed.encode()).hexdigest()}
        | _tags(job, axes, run["overrides"])
        | measures
        | _origin(run, "per_site.json"),
        params=axes | fields,
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
    axes, label, fields = _described(job)
    config, error = job.path / ".hydra/config.yaml", _cut(job.failure["error"])
    return Entry(
        name=naming.job_name(job, axes["model"], label, job.failure["overrides"]),
        identity=identity(job),
        started=config.stat().st_mtime,
        ended=job.outcome.stat().st_mtime,
        status="FAILED",
        tags=_tags(job, axes, job.failure["overrides"])
        | {"error": error, "mlflow.note.content": error},
        params=axes | fields,
        artifacts={file.name: file for file in (config, *sorted(job.path.glob("*.log")))},
    )


def opened_sweep(folder: RunFolder) -> Entry:
    """A sweep that has begun: its name alone."""
    begun = folder.read(PROCESS)  # an earlier version left none
    return Entry(
        name=f"{folder.experiment or 'sweep'} {naming.short_id(folder.path.name)}",
        identity={"kind": "sweep", "sweep": folder.path.name},
        started=begun.get("started") or (folder.path / MULTIRUN).stat().st_mtime,
        ended=0,
        process=begun.get("process", ""),
    )


def sweep_entry(folder: RunFolder, files: Sequence[Path]) -> Entry:
    """A sweep that has ended, with its tables and figures; the main table is its description.

    All of it can be logged again, as params could not: a sweep may be closed before its end.
    """
    end, experiment = folder.read(ENDED), folder.experiment
    results = sweep_results(folder.path) if folder.finished else {}
    failed = {job: job.failure for job in folder.jobs if job.failure}
    axes = [_described(job)[0] for job in dict.fromkeys([*results, *failed])]
    tags = {
        key: ", ".join(dict.fromkeys(str(each[key]) for each in axes if key in each))
        for key in dict.fromkeys(key for each in axes for key in each)
    }
    opened = opened_sweep(folder)
    name = " ".join(filter(None, (opened.name, tags.get("model"))))
    tags |= {"experiment": experiment or "none"}
    artifacts: dict[str, str | Path] = {
        f"{'figures' if path.suffix in ('.png', '.pdf') else 'tables'}/{path.name}": path
        for path in files
    }
    artifacts["multirun.yaml"] = folder.path / MULTIRUN
    if failed:
        reasons = {job.path.name: failure for job, failure in failed.items()}
        artifacts["failed.json"] = json.dumps(reasons, indent=1)
    if results:
        frame = result_frame(distinct(results.values()))
        artifacts["table.json"] = frame.to_json(orient="split", index=False)
        table = [p.read_text() for p in files if p.name == f"{naming.run_name(folder)}.md"]
        tags |= _origin(next(iter(results.values()))["run"], "table.json")
        tags |= {"mlflow.note.content": _cut("".join(table))}
    return replace(
        opened,
        name=name,
        ended=end["ended"],
        status=end["status"],
        tags=tags,
        result={"jobs": len(results), "failed": len(failed)},
        artifacts=artifacts,
    )


def identity(job: RunFolder) -> dict[str, str]:
    """The tags that only the run of this job has."""
    return {"sweep": job.path.parent.name, "job": job.path.name}


def _described(job: RunFolder) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Axes, label and other params of a job: every field of the groups that determine a result.

    Of a job without a result as far as its configuration can be read.
    """
    result, config = job.result, job.config
    axes = {key: job.choices[key] for key in ("model", "coding", "transform")}
    try:
        settings: Any = None if result else instantiate(config)
    except Exception:  # the configuration may be what the job has failed of
        with suppress(Exception):
            axes["model"] = instantiate(config.model).name
        for key in ("timesteps", "grains"):
            with suppress(Exception):
                axes[key] = config.coding[key]
        return axes, str(config.row or axes["coding"]), {}
    axes, label = (result["axes"], result["label"]) if result else (settings.axes, settings.name)
    read = {"evaluation": config.evaluation.corpora, "tasks": config.evaluation.tasks}
    axes = axes | {"sites": job.choices["sites"]} | {k: ", ".join(v) for k, v in read.items()}
    whole: Any = OmegaConf.to_container(config, resolve=True)
    fields = leaves({group: whole[group] for group in GROUPS})
    return axes, label, {name: fields[name] for name in fields if "._" not in name}


def _tags(job: RunFolder, axes: Values, overrides: Sequence[str]) -> dict[str, str]:
    tags = {name: str(axes[name]) for name in GROUPED if name in axes}
    experiment = RunFolder(job.path.parent).experiment or "none"
    return tags | {"experiment": experiment, "overrides": " ".join(overrides)}


def _origin(run: Values, table: str) -> dict[str, str]:
    """Source revision, versions and machine, and which json file the dashboard shows as a table."""
    origin = leaves({"git": run["git"], "version": run["versions"], "machine": run["machine"]})
    origin |= {"mlflow.source.name": "python -m pipeline", "mlflow.source.type": "LOCAL"}
    origin |= {"mlflow.source.git.commit": run["git"]["revision"]}  # has a column
    origin |= {"mlflow.loggedArtifacts": json.dumps([{"path": table, "type": "table"}])}
    return {name: str(value) for name, value in origin.items() if value is not None}


def _inputs(job: RunFolder) -> list[DatasetInput]:
    """The texts and questions that a job has read, by the keys of their tokens."""
    config, inputs = job.config, []
    read = [("evaluation", name, f"evaluation ppl_{name}") for name in config.evaluation.corpora]
    if "capture" in job.result["keys"]:
        read.insert(0, ("calibration", config.calibration.corpus, "capture"))
    for context, name, stage in read:
        corpus: Any = entry("corpus", name, instantiate(config.corpus[name], _convert_="all"))
        origin = corpus.origin(context)
        kind = ORIGINS.get(type(origin), "local")
        source = {"uri": str(origin)} if kind == "local" else asdict(origin)
        shape = {key: config[context][key] for key in ("windows", "length")}
        digest = manifest.read(job.artifact(stage))["inputs"]["tokens"]
        inputs.append(dataset(name, context, digest, kind, source, shape))
    for name in config.evaluation.tasks:
        task = {"task": name, "path": config.tasks[name].get("path")}
        shape = {"items": config.evaluation["items"]}  # .items is the method
        digest = manifest.read(job.artifact(f"evaluation acc_{name}"))["inputs"]["data"]
        inputs.append(dataset(name, "evaluation", digest, "questions", task, shape))
    return inputs


def dataset(
    name: str, context: str, digest: str, kind: str, source: Values, shape: Values
) -> DatasetInput:
    """A data set that a run has read: `context` says what for, `digest` which content."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    told = Dataset(name, digest[:DIGEST], kind, json.dumps(source), None, json.dumps(shape))
    return DatasetInput(told, [InputTag("mlflow.data.context", context)])


def _cut(text: str) -> str:
    """As many lines of a text as a description can hold."""
    if len(text) <= NOTE:
        return text
    return f"{text[:NOTE].rpartition(chr(10))[0]}\n\nThe whole table is among the artifacts."
