"""What a run is refused for before anything is measured: what its model cannot read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pipeline import inputs
from stages.codings.dense import Dense
from stages.llm import limits

if TYPE_CHECKING:
    from pipeline.runner import Run
    from pipeline.settings import Settings
    from stages.llm.corpus import Purpose


def check_positions(settings: Settings, prefix: int = 0) -> None:
    """Raises InputError where a window is longer than its model has positions; reads its config alone.

    `prefix` is the number of tokens that a transform keeps in front of every text.
    """
    lengths = {"evaluation.length": settings.evaluation.length}
    if _calibrates(settings):
        lengths["calibration.length"] = settings.calibration.length
    if settings.energy.tokens is not None:
        lengths["energy.tokens"] = settings.energy.tokens
    model = settings.model
    limits.check_positions(model.config(), lengths, model.name, model.positions, prefix)


def check_prefix(run: Run) -> None:
    """The same behind the prefix that was found."""
    if "prefix" in run.artifacts:
        file = run.artifacts["prefix"].path / inputs.PREFIX
        check_positions(run.settings, len(json.loads(file.read_text())["ids"]))


def check_tokens(run: Run) -> None:
    """Raises InputError where a window holds a token that the model's embedding lacks."""
    s = run.settings
    rows = limits.vocabulary(s.model.config())
    source = run.model.plain if run.model.prefix else run.model  # whose prefix is not there yet
    s.model.check_begin(rows)
    parts: list[tuple[str, Purpose, int]] = [
        (name, "evaluation", s.evaluation.windows * s.evaluation.length)
        for name in s.evaluation.corpora
    ]
    if _calibrates(s):
        windows = s.calibration.windows + s.patching.windows
        parts.append((s.calibration.corpus, "calibration", windows * s.calibration.length))
    for name, purpose, count in parts:
        artifact = inputs.tokens(s.corpus[name], purpose, source, run.store)
        ids = inputs.load_tokens(artifact)[:count]
        if ids.numel() and int(ids.max()) >= rows:
            _, tokenizer = source.load()
            limits.check_tokens(ids, rows, f"the {purpose} text {name}", tokenizer)


def _calibrates(settings: Settings) -> bool:
    return not isinstance(settings.coding, Dense) or settings.transform.search is not None
