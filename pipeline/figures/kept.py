"""Figures as files, drawn once of the same content: the store keeps them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.results.folders import NEUROBENCH, SITES, RunFolder
from pipeline.run.measured import KINDS, PARTS
from pipeline.store import provenance
from pipeline.store.spec import StoreSpec
from pipeline.store.step import Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Jobs = Mapping[RunFolder, Mapping[str, Any]]  # results by the folder of the job
Draw = Callable[[], Mapping[str, "Figure"]]  # figures by their kinds
FILES = (SITES, NEUROBENCH, KINDS, PARTS, ".hydra/config.yaml")  # of a job, that figures are of
ORDER = "order.json"
PACKAGES = ("pipeline", "stages")


@dataclass(frozen=True)
class Kept:
    """The figures of jobs in files with these `suffixes`, in the store of the jobs."""

    jobs: Jobs
    suffixes: tuple[str, ...]

    def save(self, draw: Draw, stem: Callable[[str], Path]) -> list[Path]:
        """Write every figure to the stem of its kind with each suffix; returns the files.

        `draw` makes them where the store has none of this content, or cannot be written to.
        """
        spec = StoreSpec.of(next(iter(self.jobs)).config.store)
        make = functools.partial(self._make, draw)
        if spec.folder.is_dir() and os.access(spec.folder, os.W_OK):
            return self._copied(spec.open().build(self._step(), make).path, stem)
        with tempfile.TemporaryDirectory() as place:
            make(Path(place))
            return self._copied(Path(place), stem)

    def _make(self, draw: Draw, out: Path) -> None:
        from pipeline.figures import style

        figures = draw()
        for kind, figure in figures.items():
            style.save(figure, out / kind, self.suffixes)
        (out / ORDER).write_text(json.dumps([*figures]))

    def _copied(self, folder: Path, stem: Callable[[str], Path]) -> list[Path]:
        kinds = json.loads((folder / ORDER).read_text())
        pairs = [
            (folder / f"{k}.{s}", stem(k).with_name(f"{stem(k).name}.{s}"))
            for k in kinds
            for s in self.suffixes
        ]
        return [Path(shutil.copyfile(*pair)) for pair in pairs]

    def _step(self) -> Step:
        content = [_content(job, result) for job, result in self.jobs.items()]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        versions = provenance.versions() | {"matplotlib": version("matplotlib")}
        spec: dict[str, Any] = {"content": digest, "suffixes": self.suffixes, "sources": _sources()}
        spec |= {"versions": versions}
        return Step("figures", spec, {}, ())


def comparable(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without what differs between two runs that have measured the same: when and where they ran,
    and what they took from the store."""
    kept = {
        name: value for name, value in result.items() if name not in ("run", "hits", "compiled")
    }
    return kept | {"run": {"overrides": (result.get("run") or {}).get("overrides", [])}}


def _content(job: RunFolder, result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of a job that a figure may show: the keys in its result stand for its artifacts."""
    files = {name: job.path / name for name in FILES}
    digests = {
        n: hashlib.sha256(f.read_bytes()).hexdigest() for n, f in files.items() if f.exists()
    }
    return {"result": comparable(result), "files": digests}


@functools.cache
def _sources() -> str:
    """A hash of all sources of this program: any of them may draw, or name what is drawn."""
    files = sorted(f for package in PACKAGES for f in (provenance.ROOT / package).rglob("*.py"))
    parts = (f"{f.relative_to(provenance.ROOT)}\n".encode() + f.read_bytes() for f in files)
    return hashlib.sha256(b"\n".join(parts)).hexdigest()
