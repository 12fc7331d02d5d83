"""What would fail hours later is refused first: settings, texts, windows, questions."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any, Literal

from pipeline.run.chain import Chain
from pipeline.run.models import prefix_ids
from pipeline.run.settings import Settings
from pipeline.run.stage import Running
from pipeline.run.texts import fetch_questions, load_tokens, refuse_overlap, say_protocol
from pipeline.store.store import Artifact, Store
from stages.checkpoint.paper import PaperNeurons
from stages.errors import InputError
from stages.model import limits
from stages.model.loading import meta_model
from stages.model.sites import Site, find_sites, select
from stages.text import corpus as text
from stages.text.documents import check_head

log = logging.getLogger(__name__)


def configured(settings: Settings) -> None:
    """Raises InputError for settings of which a later stage would say that they do not go together."""
    settings.check_offloaded()
    coding = settings.coding
    if not coding.converts:
        return
    if settings.runtime.execution == "stepped" or settings.evaluation.anytime:
        from stages.ports.stepped import check_steps  # takes seconds to import what it needs

        check_steps(coding)
    if settings.fitting.neurons is not None:
        PaperNeurons.load(Path(settings.fitting.neurons).expanduser()).check(coding)
    for statistic in coding.statistics:
        windows = statistic.least_windows
        if windows > settings.calibration.windows:
            raise InputError(
                f"coding={coding.name} measures {statistic.name} on {windows} windows, and "
                f"calibration.windows={settings.calibration.windows}: give as many, or lower the other"
            )


def described(steps: Chain) -> None:
    """Raises InputError where the config of the model tells that a stage would fail: windows too long,
    sites that cannot be resolved.

    Artifacts that are there have passed this when they were made: their keys have the lengths and the
    sites. It takes seconds to import what reads a model, so that a job whose artifacts are all there is
    spared it, but for a number of positions that the settings have changed, which no key has.
    """
    settings = steps.settings
    if not steps.stored or settings.model.positions is not None:
        positions(settings)
        sites(settings)


def positions(settings: Settings, prefix: int = 0) -> None:
    """Raises InputError where a window is longer than its model has positions; reads its config alone.

    `prefix` is the number of tokens that a transform keeps in front of every text.
    """
    lengths = {"evaluation.length": settings.evaluation.length}
    if settings.coding.converts or settings.transform.search is not None:
        lengths["calibration.length"] = settings.calibration.length
    if settings.energy.tokens is not None:
        lengths["energy.tokens"] = settings.energy.tokens
    model, config = settings.model, settings.model.config()
    limits.check_positions(config, lengths, model.name, model.positions, prefix)
    if settings.transform.search is not None:  # whose prefix has a token at least
        from stages.transforms.prefix import check_lengths  # likewise

        lengths.pop("energy.tokens", None)  # which no pass reads
        check_lengths(config, max(prefix, 1), lengths)


def sites(settings: Settings) -> None:
    """Raises InputError for a model whose sites cannot be resolved, and for a choice that names none."""
    config = settings.model.config()
    kind: Any = type(config)
    every = _sites(kind, config.to_json_string(use_diff=False))
    if settings.coding.converts:
        select(every, settings.sites)


@functools.lru_cache(maxsize=8)  # the jobs of a sweep share their model
def _sites(kind: Any, described: str) -> tuple[Site, ...]:
    return tuple(find_sites(meta_model(kind.from_dict(json.loads(described)))))


def behind_prefix(settings: Settings, prefix: Artifact) -> None:
    """The same once the prefix is known."""
    positions(settings, len(prefix_ids(prefix)))


def planned(chain: Chain) -> None:
    """Raises InputError for what the heads of local files and the settings tell; builds nothing."""
    settings = chain.settings
    configured(settings)
    described(chain)
    for name, purpose in chain.tokens:
        corpus = settings.corpus[name]
        origin = corpus.origin(purpose)
        if isinstance(origin, Path):
            _head(origin, corpus.field, corpus.rows)
    local = [name for name in settings.evaluation.tasks if settings.tasks[name].path is not None]
    _questions(chain, chain.model.store, local)


def complete(steps: Chain, store: Store, runtime: Running) -> None:
    """Raises InputError unless texts and questions suffice for all stages. Their tokens are made for
    it, which needs the tokenizer alone; questions are read where their accuracy is not stored."""
    _texts(steps, store, runtime)
    _questions(steps, store, steps.settings.evaluation.tasks)


def _texts(steps: Chain, store: Store, runtime: Running) -> None:
    """Windows enough in every text, of tokens that the model has, and no document in two of them."""
    s, spec = steps.settings, steps.settings.calibration
    vocabulary = None  # that artifacts which are there have been compared with when they were made
    if not steps.stored:
        vocabulary = limits.vocabulary(s.model.config())
        s.model.check_begin(vocabulary)
    tokens = {part: stage.build(store, runtime) for part, stage in steps.tokens.items()}
    for (corpus, purpose), stage in steps.tokens.items():
        say_protocol(s.corpus[corpus], purpose, stage, tokens[corpus, purpose])
    calibration = tokens.get((spec.corpus, "calibration"))
    if calibration is not None:
        held_out = s.patching.windows if steps.patching is not None else 0
        name = f"calibration text {spec.corpus}"
        _windows(steps, calibration, name, (spec.windows, held_out), spec.length, vocabulary)
    for name in s.evaluation.corpora:
        evaluated = tokens[name, "evaluation"]
        windows, text = (s.evaluation.windows, 0), f"evaluation text {name}"
        _windows(steps, evaluated, text, windows, s.evaluation.length, vocabulary)
        if calibration is not None:
            refuse_overlap(calibration, evaluated)


def _windows(
    steps: Chain,
    tokens: Artifact,
    name: str,
    windows: tuple[int | Literal["all"], int],
    length: int,
    vocabulary: int | None,
) -> None:
    """Refuses a text that has not so many windows and then so many more, or not of the vocabulary, where
    that is given; logs what is left out where all are read."""
    ids, (first, more) = load_tokens(tokens), windows
    begin = steps.settings.model.begin
    read = [text.windows(ids, first, length, 0, name, begin)]
    if first == text.ALL:
        count, rest = len(read[0]), text.remainder(ids, length, begin)
        log.info("%s: all %d windows of %d tokens; %d fill none", name, count, length, rest)
    elif more:
        read.append(text.windows(ids, more, length, first * length, name, begin))
    if vocabulary is not None and any(int(each.max()) >= vocabulary for each in read):
        tokenizer = steps.model.tokenizer()
        for each in read:
            limits.check_tokens(each, vocabulary, f"the {name}", tokenizer)


@functools.cache  # the jobs of a sweep share their texts
def _head(path: Path, field: str, rows: str) -> None:
    check_head(path, field, rows)


def _questions(chain: Chain, store: Store, names: Any) -> None:
    measured = chain.measured
    sets = [each for each in (measured.evaluated, measured.dense) if each is not None]
    stages = {name: [stage for each in sets for stage in each.accuracies[name]] for name in names}
    unknown = {n: [s for s in every if store.find(s.step) is None] for n, every in stages.items()}
    missing = {name: stages[0] for name, stages in unknown.items() if stages}
    fetch_questions([chain.settings.tasks[name] for name in missing], store)
    for name, stage in missing.items():
        from stages.text import harness  # takes seconds to import what it needs

        file = stage.inputs["data"].open(store, None)
        harness.check(chain.settings.tasks[name], file, chain.settings.evaluation.items)
