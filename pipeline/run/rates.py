"""How fast a machine multiplies, moves memory and reads files: as given, or as measured."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.run.devices import resolve
from pipeline.store import provenance, whole
from stages.errors import InputError
from stages.model.products import products

if TYPE_CHECKING:
    from pipeline.run.settings import Settings

FILE = Path("outputs/rates.json")
NAMES = ("flops", "memory", "disk", "network")
ROWS = 512  # tokens of the product that is timed
MOST_WEIGHTS = 1 << 26  # numbers of its matrix
COPIED = 1 << 26  # bytes
READ = 1 << 28  # bytes of the file
SECONDS = 2.0  # that a product or a copy is repeated


@dataclass(frozen=True)
class Rates:
    """Of one worker: operations a second of matrix products, bytes a second of memory, of disk and of
    network. `kind`: cpu or cuda; `source`: where the numbers come from."""

    flops: float
    memory: float
    disk: float
    network: float
    kind: str
    source: str


def of_worker(settings: Settings, config: Any) -> Rates:
    """The rates of each of the workers; those of this machine share its cores, its memory and its disk.

    Raises InputError where neither the options nor `plan.reference` have one for the device and the dtype.
    """
    plan, device = settings.plan, _device(settings.runtime)
    here = None
    if plan.measure or device.type != "cuda" or torch.cuda.is_available():
        resolve(str(device))
        name = _name(device, settings, config)
        if plan.measure:
            _keep(name, _measured(device, settings, config))
        here = _kept().get(name)
    known = here or _reference(settings, device.type)
    given = {n: getattr(plan, n) for n in NAMES if getattr(plan, n) is not None}
    rates = {**known, **given}
    source = f"measured here {known['date']}" if here else f"of {known['machine']}, {known['date']}"
    named = [each for each in given if each != "network"]
    if named:
        source = f"{', '.join(named)} as given" + ("" if len(named) == 3 else f", others {source}")
    parts = _sharing(settings.runtime)
    flops, memory, disk = (float(rates[name]) / parts for name in NAMES[:3])
    return Rates(flops, memory, disk, float(rates["network"]), device.type, source)


def _device(runtime: Any) -> torch.device:
    """The device of a worker: of a GPU that a plan names other machines than this one may have."""
    name = runtime.devices[0] if runtime.devices else runtime.device
    try:
        if torch.device(name).type == "cuda":
            return torch.device(name)
    except RuntimeError:  # auto, or none that there is
        pass
    return torch.device(resolve(name))


def _sharing(runtime: Any) -> int:
    """How many workers have a machine together, each with its part of it."""
    return int(runtime.workers) if runtime.engine == "local" else 1


def _name(device: torch.device, settings: Settings, config: Any) -> str:
    """What a measurement is of: machine, device, dtype and shape."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else provenance.processor()
    width, inner = _shape(config)
    return f"{platform.node()} {chip} {os.cpu_count()} {settings.model.dtype} {width}x{inner}"


def _shape(config: Any) -> tuple[int, int]:
    """Inputs and outputs of the product, those of a model's MLP unless its matrix is large."""
    text = config.get_text_config()
    width = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * width)
    return width, min(inner, MOST_WEIGHTS // width)


def _reference(settings: Settings, kind: str) -> dict[str, Any]:
    reference = settings.plan.reference
    known = reference.get(kind, {})
    dtype = settings.model.dtype
    if dtype not in known.get("flops", {}):
        raise InputError(
            f"plan.reference has no rates of {kind} in {dtype}: measure this machine's by "
            "plan.measure=true, or give plan.flops=, plan.memory= and plan.disk="
        )
    return {**known, "flops": known["flops"][dtype]}


def _measured(device: torch.device, settings: Settings, config: Any) -> dict[str, Any]:
    """Seconds of a product and of a copy, the least of some, as whatever else the machine does adds to
    them; and of a file that the system does not hold."""
    dtype, (width, inner) = getattr(torch, settings.model.dtype), _shape(config)
    with torch.inference_mode():
        x = torch.randn(ROWS, width, device=device, dtype=dtype)
        layer = torch.nn.Linear(width, inner, bias=False, device=device, dtype=dtype)
        with products(layer):
            product = _seconds(device, lambda: layer(x))
        source = torch.ones(COPIED // 4, device=device)
        copy = torch.empty_like(source)
        copied = _seconds(device, lambda: copy.copy_(source))
    return {
        "flops": 2 * ROWS * width * inner / product,
        "memory": 2 * COPIED / copied,
        "disk": READ / _reading(settings.store.folder),
        "network": settings.plan.network,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _seconds(device: torch.device, work: Callable[[], Any]) -> float:
    def once() -> float:
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    once()
    least, until = once(), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        least = min(least, once())
    return least


def _reading(store: Path) -> float:
    """Seconds to read a file that is written for it, where the store is."""
    folder = next(path for path in (store, *store.absolute().parents) if path.exists())
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(READ >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begin = time.perf_counter()
        while file.read(1 << 22):
            pass
        return time.perf_counter() - begin


def _kept() -> dict[str, Any]:
    try:
        return dict(json.loads(FILE.read_text()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(
            f"{FILE} cannot be read ({error}): delete it, and give plan.measure=true"
        ) from None


def _keep(name: str, rates: dict[str, Any]) -> None:
    every = _kept() | {name: rates}
    whole.write(FILE, json.dumps(every, indent=1) + "\n")
