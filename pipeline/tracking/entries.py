"""What is logged of a job or a sweep, from its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

Values = Mapping[str, Any]
Draw = Callable[[RunFolder], Sequence[Path]]  # what a run's folder has of tables and figures
# Groups of the configuration whose fields are params by group.field.
GROUPS = ("calibration", "coding", "distribution", "evaluation", "fitting", "transform")
GROUPED = ("coding", "row", "transform", "model")  # tags by which the dashboard groups jobs
NO_METRIC = ("run", "axes", "evaluation", "label", "environments", "bootstrap")  # of result.json
LONGEST = 7500  # characters of a tag; MLflow cuts it at 8000, and says so
DIGEST = 36  # characters of a data set's digest, MLflow's limit


def job_entry(job: RunFolder, draw: Draw) -> Entry:
    """A job that has ended, with its pictures; of a failed one why, and what its configuration says."""
    failed, config = job.outcome.name == FAILED, job.path / ".hydra/config.yaml"
    times = {"started": config.stat().st_mtime, "ended": job.outcome.stat().st_mtime}
    run = times | (job.failure if failed else job.result["run"])
    axes, label, fields = _described(job)
    ended = Entry(
        name=naming.job_name(job, axes["model"], label, run["overrides"]),
        identity=identity(job),
        started=run["started"],
        ended=run["ended"],
        tags={name: axes[name] for name in GROUPED if name in axes}
        | {"experiment": RunFolder(job.path.parent).experiment or "none"}
        | {"overrides": " ".join(run["overrides"])},
        params=axes | fields,
    )
    if failed:
        error, logs = run["error"][:LONGEST], sorted(job.path.glob("*.log"))
        return replace(
            ended,
            status="FAILED",
            tags={**ended.tags, "error": error, "mlflow.note.content": error},
            artifacts={file.name: file.read_bytes() for file in (config, *logs)},
        )
    result = job.result
    determined = json.dumps([axes["model"], label, result["keys"]], sort_keys=True)
    computed = {COMPUTATION: hashlib.sha256(determined.encode()).hexdigest()}
    return replace(
        ended,
        tags={**ended.tags, **computed, **_origin(run, "per_site.json")},
        result={name: v for name, v in result.items() if name not in (*NO_METRIC, *axes)}
        | {f"nll_{corpus}": metrics["nll"] for corpus, metrics in result["evaluation"].items()},
        inputs=[*_inputs(job)],
        artifacts={
            "config.yaml": OmegaConf.to_yaml(job.config, resolve=True).encode(),
            "per_site.json": job.sites.to_json(orient="split", index=False).encode(),
            **{name: (job.path / name).read_bytes() for name in (KINDS, PARTS)},
            **{f"figures/{path.name}": path.read_bytes() for path in draw(job)},
        },
    )


def opened_sweep(folder: RunFolder) -> Entry:
    """A sweep that has begun: its name alone."""
    begun: dict[str, Any] = {"started": (folder.path / MULTIRUN).stat().st_mtime}
    begun |= folder.read(PROCESS)  # an earlier version left none
    return Entry(
        name=f"{folder.experiment or 'sweep'} {naming.short_id(folder.path.name)}",
        identity={"kind": "sweep", "sweep": folder.path.name},
        ended=0,
        **begun,
    )


def sweep_entry(folder: RunFolder, draw: Draw) -> Entry:
    """A sweep that has ended, with its tables and figures; the main table is its description.

    All of it can be logged again, as params could not: a sweep may be closed before its end.
    """
    opened, end, files = opened_sweep(folder), folder.read(ENDED), draw(folder)
    results = sweep_results(folder.path) if folder.finished else {}
    failed = sum(bool(job.failure) for job in folder.jobs)
    values: dict[str, dict[str, None]] = {}
    for job in folder.ended:
        for axis, value in _described(job)[0].items():
            values.setdefault(axis, {})[str(value)] = None
    tags: dict[str, Any] = {axis: ", ".join(each) for axis, each in values.items()}
    artifacts = {
        f"{'figures' if path.suffix in ('.png', '.pdf') else 'tables'}/{path.name}": path.read_bytes()
        for path in files
    }
    artifacts[MULTIRUN] = (folder.path / MULTIRUN).read_bytes()
    if results:
        frame = result_frame(distinct(results.values()))
        artifacts["table.json"] = frame.to_json(orient="split", index=False).encode()
        tags |= _origin(next(iter(results.values()))["run"], "table.json")
        table = artifacts.get(f"tables/{naming.run_name(folder)}.md", b"").decode()
        whole = table[:LONGEST].rpartition("\n")[0]  # lines
        more = "" if len(table) <= LONGEST else "\n\nThe whole table is among the artifacts."
        tags["mlflow.note.content"] = whole + more
    return replace(
        opened,
        name=f"{opened.name} {tags['model']}",
        ended=end["ended"],
        status=end["status"],
        tags={**tags, "experiment": folder.experiment or "none"},
        result={"jobs": len(results), "failed": failed},
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
    try:
        settings: Any = None if result else instantiate(config)
    except Exception:  # the configuration may be what the job has failed of
        axes = {key: job.choices[key] for key in ("model", "coding", "transform")}
        with suppress(Exception):
            axes |= {k: config.coding[k] for k in ("timesteps", "grains") if k in config.coding}
            axes["model"] = instantiate(config.model).name
        return axes, str(config.row or axes["coding"]), {}
    axes, label = (result["axes"], result["label"]) if result else (settings.axes, settings.name)
    read = {"evaluation": config.evaluation.corpora, "tasks": config.evaluation.tasks}
    axes = axes | {"sites": job.choices["sites"]} | {k: ", ".join(v) for k, v in read.items()}
    whole: Any = OmegaConf.to_container(config, resolve=True)
    fields = leaves({group: whole[group] for group in GROUPS})
    return axes, label, {name: fields[name] for name in fields if "._" not in name}


def _origin(run: Values, table: str) -> dict[str, Any]:
    """Source revision, versions and machine, and which json file the dashboard shows as a table."""
    origin = {"git": run["git"], "version": run["versions"], "machine": run["machine"]}
    origin |= {"mlflow.source.git.commit": run["git"]["revision"]}  # has a column
    return origin | {"mlflow.loggedArtifacts": json.dumps([{"path": table, "type": "table"}])}


def _inputs(job: RunFolder) -> Iterator[DatasetInput]:
    """The texts and questions that a job has read, by the keys of their tokens."""
    config = job.config
    read = [("evaluation", name, f"evaluation ppl_{name}") for name in config.evaluation.corpora]
    if "capture" in job.result["keys"]:
        read.insert(0, ("calibration", config.calibration.corpus, "capture"))
    for context, name, stage in read:
        corpus: Any = entry("corpus", name, instantiate(config.corpus[name], _convert_="all"))
        origin = corpus.origin(context)
        source = {"uri": str(origin)} if isinstance(origin, Path) else asdict(origin)
        digest = manifest.read(job.artifact(stage))["inputs"]["tokens"]
        yield dataset(name, context, digest, "text", source)
    for name in config.evaluation.tasks:
        task = {"task": name, "path": config.tasks[name].get("path")}
        digest = manifest.read(job.artifact(f"evaluation acc_{name}"))["inputs"]["data"]
        yield dataset(name, "evaluation", digest, "questions", task)


def dataset(name: str, context: str, digest: str, kind: str, source: Values) -> DatasetInput:
    """A data set that a run has read: `context` says what for, `digest` which content."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    read = Dataset(name, digest[:DIGEST], kind, json.dumps(source))
    return DatasetInput(read, [InputTag("mlflow.data.context", context)])
