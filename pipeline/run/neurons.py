"""Neurons that were imported, as what a stage is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.run.fingerprint import digest
from pipeline.run.stage import Source
from pipeline.store.step import Step
from pipeline.store.store import Store
from stages.checkpoint.paper import META, TENSORS, PaperNeurons


@dataclass(frozen=True, eq=False)
class NeuronFolder:
    """A folder that `import-paper` wrote, which its content identifies."""

    path: Path
    inputs: Mapping[str, Source] = field(default_factory=dict)

    def key(self) -> str:
        """Of its content. Raises InputError for another folder."""
        PaperNeurons.load(self.path)
        files = {name: digest(self.path / name) for name in (TENSORS, META)}
        return Step("neurons", files, {}, ()).key()

    def open(self, store: Store, runtime: Any) -> PaperNeurons:
        return PaperNeurons.load(self.path)
