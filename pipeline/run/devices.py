"""Which device a job runs on, and jobs that run at once each on their own of a list."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout

from pipeline.store.store import LOCKS
from stages.errors import InputError

if TYPE_CHECKING:
    from pipeline.run.settings import Settings

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2


def resolve(name: str, key: str = "runtime.device") -> str:
    """The device of that name, the value of `key`; `auto` is a GPU if there is one, else cpu.

    Raises InputError for a device that this machine lacks.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":  # an allocation would open a context on every device of a list
            present = (device.index or 0) < torch.cuda.device_count()
        else:
            torch.empty(0, device=device)
            present = True
    except (RuntimeError, AssertionError):
        present = False
    if not present:
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise InputError(f"{key}: no {name} here; choose among {', '.join(['cpu', *gpus])}")
    return name


@contextmanager
def placed(settings: Settings) -> Iterator[Settings]:
    """The settings on the device that their job has for itself until the end of the block.

    With `runtime.devices` the job takes the first that no other job of the store holds on this
    machine, and waits while there is none; a killed job's device is free again. Without, the job
    runs on `runtime.device`, which it may share.
    """
    runtime = settings.runtime
    if runtime.devices is None:
        yield settings
        return
    if settings.model.device_map is not None:
        raise InputError(
            f"runtime.devices places a model on one device, model.device_map="
            f"{settings.model.device_map} spreads it over all: set one of them to null"
        )
    devices = [resolve(name) for name in runtime.devices]
    locks = settings.store.folder / LOCKS
    locks.mkdir(parents=True, exist_ok=True)
    name, lock = _take(devices, locks)
    log.info("on %s", name)
    try:
        if name.startswith("cuda"):
            torch.cuda.set_device(name)  # so that nothing lands on the first GPU by default
        yield replace(settings, runtime=replace(runtime, device=name))
    finally:
        lock.release()


def _take(devices: Sequence[str], folder: Path) -> tuple[str, FileLock]:
    """The first free device and its lock, held; machines that share a store have locks of their own."""
    machine = platform.node()
    locks = {d: FileLock(folder / f"device-{machine}-{d.replace(':', '-')}.lock") for d in devices}
    waiting = False
    while True:
        for name, lock in locks.items():
            try:
                lock.acquire(timeout=0)
                return name, lock
            except Timeout:
                continue
        if not waiting:
            log.info("other jobs are on %s; waiting for one to end", ", ".join(devices))
            waiting = True
        time.sleep(POLL_SECONDS)
