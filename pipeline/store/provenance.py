"""Where a result comes from: versions, source revision and machine, as recorded beside it."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "lm-eval",
    "datasets",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "mlflow",
    "hydra-core",
    "omegaconf",
)


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that can move a number; None where not installed."""
    numbers: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            numbers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            numbers[name] = None
    return numbers


def libraries() -> dict[str, str]:
    """Minor versions of what computes a model: another one may round, or read a checkpoint, otherwise."""
    release = {name: str(versions()[name]).partition("+")[0] for name in ("torch", "transformers")}
    return {name: ".".join(number.split(".")[:2]) for name, number in release.items()}


@functools.cache
def git_state() -> dict[str, str | bool | None]:
    """Revision of this source tree and whether it has changes; None where git does not know it."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top) != ROOT.resolve():  # installed somewhere inside another repository
        return {"revision": None, "dirty": None}
    status = _git("status", "--porcelain")
    return {
        "revision": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else status != "",
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command that takes no lock in the repository, None if it fails."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def machine() -> dict[str, str | int | None]:
    """Number of processors, platform and the name of the device in use."""
    return {"cpus": os.cpu_count(), "platform": platform.platform(), "device": _device()}


def _device() -> str:
    """Name of the GPU if this process has started one, else of the processor.

    torch is asked only when it is loaded already: reading a store must stay quick.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    return processor()


@functools.cache
def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
