"""What the tests of shared stores build, break and start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.store.objects import Objects
from pipeline.store.shared import SharedStore
from pipeline.store.step import Step
from pipeline.store.store import Artifact
from tests.pipeline.conftest import REPOSITORY

BUILDER = """
import logging, sys, time
from pathlib import Path
from pipeline.store import locks
locks.SECONDS, locks.POLL = 2.0, 0.05
from pipeline.store.spec import StoreSpec
from pipeline.store.step import Step

logging.basicConfig(level=logging.INFO)
address, cache, lock, side, pause = *sys.argv[1:4], Path(sys.argv[4]), float(sys.argv[5])

def make(folder):
    with side.open("a") as stream:
        stream.write("built\\n")
    time.sleep(pause)
    (folder / "data.txt").write_text("whole")

built = StoreSpec(address, cache, lock).open().build(Step("demo", {"x": 1}, {}, ("stages.errors",)), make)
print(built.hit, (built.path / "data.txt").read_text())
"""
Machine = Callable[..., SharedStore]


def step(x: int = 1, stage: str = "demo") -> Step:
    return Step(stage, {"x": x}, {}, ("stages.errors",))


def writing(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "data.txt").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "more.bin").write_bytes(text.encode() * 100)

    return make


def content(artifact: Artifact | None) -> str:
    assert artifact is not None
    text = (artifact.path / "data.txt").read_text()
    assert (artifact.path / "deep/more.bin").read_bytes() == text.encode() * 100
    return text


def files(store: SharedStore) -> list[str]:
    return sorted(store.remote.objects.ages(".files"))


def alter(remote: Objects, name: str) -> None:
    remote.write(name, b"z" * len(remote.read(name) or b""))


def cut(remote: Objects, name: str) -> None:
    remote.write(name, (remote.read(name) or b"")[:-5])


def drop(remote: Objects, name: str) -> None:
    remote.delete(name)


def builder(address: str, cache: Path, lock: str, side: Path, pause: float) -> Any:
    command = [sys.executable, "-c", BUILDER, address, str(cache), lock, str(side), str(pause)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True)
