"""Who starts the workers of a conversion: processes of this machine, Ray, Slurm by submitit."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from pipeline.run.errors import choose
from pipeline.run.settings import Runtime
from pipeline.run.shipped import CONF
from stages.errors import InputError

RETRIES = 3  # of a worker that dies
GRACE_SECONDS = 5.0  # for a process to clean up
Function = Callable[[], Any]


class Worker(Protocol):
    """A function that runs elsewhere."""

    def done(self) -> bool: ...

    def result(self) -> Any:
        """What the function has returned; any exception says that its process has died."""

    def stop(self) -> None:
        """End it, wherever it is."""


class Engine(Protocol):
    """Starts workers, each with so many `threads`."""

    threads: int

    def start(self, function: Function) -> Worker: ...

    def close(self) -> None: ...


def engine(runtime: Runtime, folder: Path) -> Engine:
    """The engine of a runtime; `folder` takes what it writes. Raises InputError where it is missing."""
    if runtime.engine == "local":
        return Local(runtime.threads or max(1, torch.get_num_threads() // runtime.workers))
    options = _options(runtime.engine, runtime.cluster or {})
    kind: Any = {"ray": Ray, "slurm": Slurm}[runtime.engine]
    made: Engine = kind(options, runtime.threads, folder)
    return made


class Local:
    """Processes of this machine, which share its cores and end with the one that has started them.

    Those of the standard library: an executor's would all be given up with the first that dies.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._workers: list[LocalWorker] = []

    def start(self, function: Function) -> Worker:
        self._workers.append(LocalWorker(function))
        return self._workers[-1]

    def close(self) -> None:
        for worker in self._workers:
            worker.end()


class LocalWorker:
    def __init__(self, function: Function) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would have torch's threads
        self._answer, answer = context.Pipe(duplex=False)
        self._process = context.Process(target=_reply, args=(answer, function))
        with _without_bars():
            self._process.start()
        answer.close()

    def done(self) -> bool:
        return not self._process.is_alive()

    def result(self) -> Any:
        self._process.join()
        try:
            return self._answer.recv()
        except EOFError:
            code = self._process.exitcode or 0
            by = f"signal {-code}" if code < 0 else f"exit status {code}"
            raise ChildProcessError(f"ended by {by}") from None

    def stop(self) -> None:
        self._process.terminate()

    def end(self) -> None:
        """Wait for a process that was stopped or is done; not long."""
        self._process.join(GRACE_SECONDS)
        self._process.kill()
        self._process.join()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Let a process that starts draw no progress bars: tqdm reads that when it is imported."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TQDM_DISABLE"]
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


def _reply(answer: Connection, function: Function) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # such that nothing is left half-written
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer.send(function())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # nobody waits for an answer; its locks are given back
    time.sleep(GRACE_SECONDS)
    os._exit(1)


class Ray:
    """Tasks of a Ray cluster; Ray itself starts another one for a task whose process or node dies."""

    def __init__(self, options: Mapping[str, Any], threads: int | None, folder: Path) -> None:
        try:
            import ray
        except ImportError:
            raise _missing("ray", "ray") from None
        self._ray = ray
        self._resources = {name: options[name] for name in ("num_cpus", "num_gpus")}
        self.threads = threads or max(1, int(options["num_cpus"]))
        self._began = not ray.is_initialized()
        if self._began:
            ray.init(address=options["address"], log_to_driver=False)

    def start(self, function: Function) -> Worker:
        task = self._ray.remote(**self._resources, max_retries=RETRIES)(_called)
        return RayWorker(self._ray, task.remote(function))

    def close(self) -> None:
        if self._began:
            self._ray.shutdown()


def _called(function: Function) -> Any:
    return function()


class RayWorker:
    def __init__(self, ray: Any, task: Any) -> None:
        self._ray, self._task = ray, task

    def done(self) -> bool:
        return bool(self._ray.wait([self._task], timeout=0)[0])

    def result(self) -> Any:
        return self._ray.get(self._task)

    def stop(self) -> None:
        self._ray.cancel(self._task, force=True)


class Slurm:
    """Slurm jobs by submitit, one for each worker; scripts and logs lie in `folder`."""

    cluster = "slurm"

    def __init__(self, options: Mapping[str, Any], threads: int | None, folder: Path) -> None:
        try:
            import submitit
        except ImportError:
            raise _missing("submitit", "slurm") from None
        self.threads = threads or int(options["cpus_per_task"])
        with _submitting():
            self._executor = submitit.AutoExecutor(folder=str(folder / "%j"), cluster=self.cluster)
        plain = ("name", "timeout_min", "cpus_per_task", "mem_gb")
        own = ("partition", "additional_parameters", "setup", "gpus_per_node")
        given = {name: options[name] for name in plain}
        given |= {f"slurm_{name}": options[name] for name in own}
        self._executor.update_parameters(**{n: v for n, v in given.items() if v is not None})

    def start(self, function: Function) -> Worker:
        with _submitting():
            return SlurmWorker(self._executor.submit(function))

    def close(self) -> None:
        return None


@contextmanager
def _submitting() -> Iterator[None]:
    """Every error of submitit that a job cannot be submitted is a RuntimeError: tells it in a line."""
    try:
        yield
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise InputError(f"runtime.engine=slurm: {why}; sbatch must work where this runs") from None


class SlurmWorker:
    def __init__(self, job: Any) -> None:
        self._job = job

    def done(self) -> bool:
        return bool(self._job.done())

    def result(self) -> Any:
        return self._job.result()

    def stop(self) -> None:
        self._job.cancel()


def _missing(package: str, extra: str) -> InputError:
    return InputError(
        f"runtime.engine={extra} needs {package}, which is not installed: pip install -c constraints.txt "
        f"-e .[{extra}], or give runtime.engine=local"
    )


def _options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a launcher's file in conf/hydra/launcher, with what differs from them."""
    known = _launcher(name)
    if unknown := [key for key in given if key not in known]:
        raise InputError(f"runtime.cluster.{unknown[0]}: {choose(unknown[0], [*known])}")
    return {**known, **given}


@functools.cache
def _launcher(name: str) -> dict[str, Any]:
    file = {"ray": "ray", "slurm": "submitit_slurm"}[name]
    values = yaml.safe_load((CONF / "hydra/launcher" / f"{file}.yaml").read_text(encoding="utf-8"))
    if name == "ray":
        return {"address": values["ray"]["init"]["address"], **values["ray"]["remote"]}
    left_out = ("_target_", "submitit_folder", "array_parallelism")  # of its sweeps alone
    return {key: value for key, value in values.items() if key not in left_out}
