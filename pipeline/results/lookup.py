"""The rows of a table, looked up in the store: its jobs composed, their keys computed, nothing built."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from pipeline.results.rows import apart, distinct
from pipeline.run import failures, runner
from pipeline.run.jobs import Job, jobs
from pipeline.run.runner import Run
from stages.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One job and what it measured: `result` is its result.json, `sites` its per-site table."""

    job: Job
    run: Run
    result: dict[str, Any]
    sites: pd.DataFrame


class Missing(InputError):
    """The store lacks results: how many, the first of them, and below it the command that makes them."""


def rows(overrides: Sequence[str], fill: bool = False) -> list[Row]:
    """The jobs of `python -m pipeline` with these overrides as the store holds them, each once.

    With `fill` what is missing is run first. Else, or where that fails, raises Missing.
    """
    stored = [(job, *runner.stored(job.settings)) for job in jobs(overrides)]
    lacking = [(job, labels) for job, _, labels in stored if labels]
    if lacking and not fill:
        raise Missing(_missing(lacking, len(stored), overrides))
    with failures.interruptible():
        failed = [line for job, _ in lacking if (line := _filled(job))]
    if failed:
        raise Missing("\n".join([f"{len(failed)} of {len(lacking)} jobs failed", *failed]))
    every = [_row(job, _again(job) if labels else run) for job, run, labels in stored]
    named = apart(row.result for row in every)
    every = [replace(row, result=result) for row, result in zip(every, named, strict=True)]
    kept = {id(result) for result in distinct([row.result for row in every])}
    return [row for row in every if id(row.result) in kept]


def _again(job: Job) -> Run:
    """What a job that was just run has left in the store."""
    run, missing = runner.stored(job.settings)
    if missing:
        raise Missing(f"{job.settings.name} is no longer in the store; run the same command again")
    return run


def _row(job: Job, run: Run) -> Row:
    result, sites = run.collect()
    return Row(job, run, result | {"run": {"overrides": list(job.overrides)}}, sites)


def _missing(lacking: Sequence[tuple[Job, list[str]]], count: int, overrides: Sequence[str]) -> str:
    job, labels = lacking[0]
    what = f"{len(lacking)} of {count} rows are not in {job.config.store.path}"
    command = shlex.join(["python", "-m", "pipeline", *overrides])
    if len(lacking) == 1:
        command = job.command
    return f"{what}: {job.settings.name} lacks {', '.join(labels)}; this runs them:\n  {command}"


def _filled(job: Job) -> str | None:
    """Runs a job; what failed, in a line, and nothing of it in memory."""
    log.info("%s", job.settings.name)
    try:
        runner.execute(job.settings, job.command)
    except Exception as error:
        line = f"  {shlex.join(job.overrides)}: {failures.reason(error)}"
        failures.release(error)
        return line
    return None
