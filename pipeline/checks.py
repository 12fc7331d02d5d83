"""What would fail hours later is refused first: settings, texts, windows, questions."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import inputs
from stages.codings.coding import Observing
from stages.codings.dense import Dense
from stages.errors import InputError
from stages.llm import corpus as text
from stages.llm.documents import check_head
from stages.llm.stepped import check_steps

if TYPE_CHECKING:
    from pipeline.chain import Chain
    from pipeline.runner import Run
    from pipeline.settings import Settings
    from pipeline.store import Store


def configured(settings: Settings) -> None:
    """Raises InputError for settings of which a later stage would say that they do not go together."""
    settings.check_offloaded()
    coding = settings.coding
    if isinstance(coding, Dense):
        return
    if settings.runtime.execution == "stepped" or settings.evaluation.anytime:
        check_steps(coding)
    statistics: Any = coding.statistics if isinstance(coding, Observing) else ()
    for statistic in statistics:
        windows = getattr(statistic, "windows", 1)
        if windows > settings.calibration.windows:
            raise InputError(
                f"coding={coding.name} measures {statistic.name} on {windows} windows, and "
                f"calibration.windows={settings.calibration.windows}: give as many, or lower the other"
            )


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
    s, spec = run.settings, run.settings.calibration
    calibration = None
    if _calibrated(run.chain):
        calibration = inputs.tokens(s.corpus[spec.corpus], "calibration", run.model, run.store)
        ids, name = inputs.load_tokens(calibration), f"calibration text {spec.corpus}"
        text.windows(ids, spec.windows, spec.length, 0, name, s.model.begin)
        if "patching" in run.chain.steps:
            used = spec.windows * spec.length
            text.windows(ids, s.patching.windows, spec.length, used, name, s.model.begin)
    for name in s.evaluation.corpora:
        tokens = inputs.tokens(s.corpus[name], "evaluation", run.model, run.store)
        count, length = s.evaluation.windows, s.evaluation.length
        ids = inputs.load_tokens(tokens)
        text.windows(ids, count, length, 0, f"evaluation text {name}", s.model.begin)
        if calibration is not None:
            inputs.refuse_overlap(calibration, tokens)


@functools.cache  # the jobs of a sweep share their texts
def _head(path: Path, field: str, rows: str) -> None:
    check_head(path, field, rows)


def _questions(chain: Chain, store: Store, names: Any) -> None:
    s = chain.settings
    missing = [n for n in names if store.find(chain.steps[f"evaluation acc_{n}"]) is None]
    specs = [s.tasks[name] for name in missing]
    for spec in specs:
        from stages.llm import harness  # takes seconds to import what it needs

        harness.check(spec, inputs.question_file(spec, specs, store), s.evaluation.items)
