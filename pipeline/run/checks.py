"""What would fail hours later is refused first: settings, texts, windows, questions."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.run import inputs
from stages.errors import InputError
from stages.model import limits
from stages.ports.stepped import check_steps
from stages.text import corpus as text
from stages.text.documents import check_head

if TYPE_CHECKING:
    from pipeline.run.chain import Chain
    from pipeline.run.runner import Run
    from pipeline.run.settings import Settings
    from pipeline.store.store import Artifact, Store
    from stages.text.corpus import Purpose


def configured(settings: Settings) -> None:
    """Raises InputError for settings of which a later stage would say that they do not go together."""
    settings.check_offloaded()
    positions(settings)
    coding = settings.coding
    if not coding.converts:
        return
    if settings.runtime.execution == "stepped" or settings.evaluation.anytime:
        check_steps(coding)
    for statistic in coding.statistics:
        windows = statistic.least_windows
        if windows > settings.calibration.windows:
            raise InputError(
                f"coding={coding.name} measures {statistic.name} on {windows} windows, and "
                f"calibration.windows={settings.calibration.windows}: give as many, or lower the other"
            )


def positions(settings: Settings, prefix: int = 0) -> None:
    """Raises InputError where a window is longer than its model has positions; reads its config alone.

    `prefix` is the number of tokens that a transform keeps in front of every text.
    """
    lengths = {"evaluation.length": settings.evaluation.length}
    if settings.coding.converts or settings.transform.search is not None:
        lengths["calibration.length"] = settings.calibration.length
    if settings.energy.tokens is not None:
        lengths["energy.tokens"] = settings.energy.tokens
    model = settings.model
    limits.check_positions(model.config(), lengths, model.name, model.positions, prefix)


def behind_prefix(run: Run) -> None:
    """The same once the prefix is known."""
    file = run.artifacts["prefix"].path / inputs.PREFIX
    positions(run.settings, len(json.loads(file.read_text())["ids"]))


def planned(chain: Chain) -> None:
    """Raises InputError for what the heads of local files and the settings tell; builds nothing."""
    settings = chain.settings
    configured(settings)
    parts = {"calibration": [settings.calibration.corpus] if _calibrated(chain) else []}
    parts["evaluation"] = list(settings.evaluation.corpora)
    for purpose, names in parts.items():
        for corpus in (settings.corpus[name] for name in names):
            origin = corpus.origin(purpose)  # type: ignore[arg-type]
            if isinstance(origin, Path):
                _head(origin, corpus.field, corpus.rows)
    own = [name for name in settings.evaluation.tasks if settings.tasks[name].path is not None]
    _questions(chain, chain.model.store, own)


def complete(run: Run) -> None:
    """Raises InputError unless texts and questions suffice for all stages. Their tokens are made for
    it, which needs the tokenizer alone; questions are read where their accuracy is not stored."""
    _texts(run)
    _questions(run.chain, run.store, run.settings.evaluation.tasks)


def _calibrated(chain: Chain) -> bool:
    return "capture" in chain.steps or "prefix" in chain.steps


def _texts(run: Run) -> None:
    """Windows enough in every text, of tokens that the model has, and no document in two of them."""
    s, spec = run.settings, run.settings.calibration
    vocabulary = limits.vocabulary(s.model.config())
    s.model.check_begin(vocabulary)
    calibration = None
    if _calibrated(run.chain):
        held_out = s.patching.windows if "patching" in run.chain.steps else 0
        windows = (spec.windows, held_out)
        calibration = _text(run, spec.corpus, "calibration", windows, spec.length, vocabulary)
    for name in s.evaluation.corpora:
        windows = (s.evaluation.windows, 0)
        tokens = _text(run, name, "evaluation", windows, s.evaluation.length, vocabulary)
        if calibration is not None:
            inputs.refuse_overlap(calibration, tokens)


def _text(
    run: Run, corpus: str, purpose: Purpose, windows: tuple[int, int], length: int, vocabulary: int
) -> Artifact:
    """The tokens of a text, which has so many windows and then so many more, of a vocabulary."""
    model, name = run.settings.model, f"{purpose} text {corpus}"
    tokens = inputs.tokens(run.settings.corpus[corpus], purpose, run.model, run.store)
    ids, (first, more) = inputs.load_tokens(tokens), windows
    read = [text.windows(ids, first, length, 0, name, model.begin)]
    if more:
        read.append(text.windows(ids, more, length, first * length, name, model.begin))
    if any(int(each.max()) >= vocabulary for each in read):
        tokenizer = run.model.tokenizer()
        for each in read:
            limits.check_tokens(each, vocabulary, f"the {name}", tokenizer)
    return tokens


@functools.cache  # the jobs of a sweep share their texts
def _head(path: Path, field: str, rows: str) -> None:
    check_head(path, field, rows)


def _questions(chain: Chain, store: Store, names: Any) -> None:
    s = chain.settings
    missing = [n for n in names if store.find(chain.steps[f"evaluation acc_{n}"]) is None]
    specs = [s.tasks[name] for name in missing]
    for spec in specs:
        from stages.text import harness  # takes seconds to import what it needs

        harness.check(spec, inputs.question_file(spec, specs, store), s.evaluation.items)
