"""Export: the spiking model as a folder that transformers reads, with a card of what was measured."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError
from stages.model.prefix import prefix_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.fitted import Conversion
    from stages.transforms.transform import Transform

MARK = ".export"  # holds the key of what was copied to a folder
PACKAGES = ("python", "torch", "transformers")
WEIGHTS = {  # by transform; of every other one a part works while the model runs
    "none": "those of the dense model",
    "fuse": "those of the dense model\nwith the scales of its norms in the weights behind them",
}
CHANGED = (
    "those of the dense model after its transform, a part of\nwhich works while the model runs and is "
    "attached with the neurons: without them the weights are of no use"
)
CARD = """---
library_name: transformers
tags: [spiking, snn, phase-coding]
---

# {title}

A spiking conversion of {model}: every selected operand of every product is a spike train, the weights
are {weights}. Coding `{coding}`, transform `{transform}`, {sites} converted operands.

| measured | |
|---|---|
{table}

Energy: {energy}. Made by

    {command}

with {versions}. It is read by

    import stages  # of the pipeline that wrote it: without it transformers reads the weights alone
    model = stages.load(FOLDER)  # or AutoModelForCausalLM.from_pretrained(FOLDER)
"""


@dataclass(frozen=True)
class Export:
    """Whether the converted model is written, and a `folder` that gets it beside the store."""

    enabled: bool
    folder: str | None

    def __post_init__(self) -> None:
        if self.folder is not None and not self.enabled:
            raise InputError("export.folder is given, but export.enabled=false: set it to true")

    def check_free(self, key: str) -> None:
        """Raise InputError where the folder is none, or holds anything but this very export."""
        if self.folder is None:
            return
        place = Path(self.folder).expanduser()
        nearest = next(p for p in (place, *place.absolute().parents) if p.exists())
        if not nearest.is_dir():
            raise InputError(f"export.folder: {nearest} is a file; give a folder")
        if place.exists() and any(place.iterdir()) and _mark(place) != key:
            raise InputError(f"export.folder: {place} is not empty; give another folder")

    def place(self, source: Path, key: str) -> None:
        """Copy an export to the folder."""
        self.check_free(key)
        if self.folder is None:
            return
        place = Path(self.folder).expanduser()
        place.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            # No link: an edit here must not change the store.
            shutil.copy2(file, place / file.name)
        (place / MARK).write_text(key)


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversion: Conversion,
    transform: Transform,
    card: str,
    folder: Path,
) -> None:
    """Write weights, neurons, config, tokenizer and card."""
    from stages.checkpoint.folder import save

    save(model, conversion, transform, prefix_ids(model), folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def card(
    row: Mapping[str, Any], sites: int, command: str, versions: Mapping[str, str], energy: str
) -> str:
    """Write the model card of a run's row of results; what was not measured is not in it."""
    measured = {
        name: value
        for name, value in row.items()
        if name.startswith(("ppl_", "acc_", "ratio_", "changed_"))
        or name
        in (
            *("timesteps", "grains", "replicates"),
            *("nmse", "spikes_per_value", "energy_J", "saving"),
        )
    }
    lines = [
        f"| {name} | {_shown(value)} |" for name, value in measured.items() if value is not None
    ]
    return CARD.format(
        title=f"{row['model']}, {row['label']}",
        model=row["model"],
        coding=row["coding"],
        transform=row["transform"],
        weights=WEIGHTS.get(row["transform"], CHANGED),
        sites=sites,
        table="\n".join(lines),
        energy=energy,
        command=command,
        versions=", ".join(f"{name} {text}" for name, text in versions.items()),
    )


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _mark(folder: Path) -> str | None:
    file = folder / MARK
    return file.read_text().strip() if file.is_file() else None
