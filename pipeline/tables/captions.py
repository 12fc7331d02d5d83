"""What stands over the paper's tables: what the numbers are over, and how to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline.results.columns import BEYOND, DIVERGED
from pipeline.results.rows import RATIO, measures

if TYPE_CHECKING:
    from pipeline.results.lookup import Row
    from pipeline.tables.sheet import Sheet

BEST = (
    "Bold: the best of its T among the spiking models that did not diverge; a perplexity or an accuracy "
    "only where its interval is clear of every other's."
)
DENSE = "vs dense: against the dense model of the same transform, with a 95 % interval paired by windows"
CONVENTIONS = (
    "the paper's counts the full attention square and one spiking operand a product; the causal one "
    "unmasked positions, both operands, gates and decode scaling. Saving: against the dense model in "
    "the same convention."
)
GRAINS = (
    "n: grains of steps in time for multigrain; for gated, neurons an activation, so log2 n "
    "bits more."
)

STEPS = (
    "steps: timesteps until the last spike of a value may have come, at the site that takes most"
)
BOUND = (
    "squared error over the least of any code of as many spikes in as many steps (Shannon's lower "
    "bound), on the calibration text"
)
MEANINGS = {
    "steps": STEPS,
    "bits": "bits: T, and log2 n where the n grains are neurons an activation; of timed log2 of the "
    "codes, of integer its own",
    "nmse": "nmse: geometric mean over the sites, on held-out activations",
    "bound_db": f"above Shannon: {BOUND}, mean over the sites, weighted by their multiplications",
    "convention": "convention: how the spikes of a value are counted",
    "spikes_per_value": "spikes / value: mean, weighted by the additions that each spike causes",
    "fitting_s": "fitting: all sites, with the statistics that the coding asks for",
    "conversion_s": "conversion: capture to patching, as measured when they were computed",
}
COSTS = {"macs_G": "MACs", "acs_G": "ACs", "energy_J": "energy", "saving": "saving"}

PUBLISHED = ("wikitext2, c4, redpajama and pile", "winogrande, arc_challenge, arc_easy and piqa")


def sweep(results: Sequence[Mapping[str, Any]], sheet: Sheet, profile: str) -> str:
    """What stands over the table of a sweep: its models, T and texts, and what its columns mean."""
    frame, shown = sheet.frame, [column.name for column in sheet.columns]
    steps = ", ".join(str(step) for step in sorted(frame["timesteps"].dropna().unique()))
    models = ", ".join(map(str, frame["model"].unique()))
    subject = f"Spiking conversions of {models} at T = {steps}" if steps else f"Dense {models}"
    corpora, tasks = measures(shown)
    questions = [_questions(frame, f"acc_{task}") for task in tasks]
    texts = [f"{corpus}{_windows(results, corpus)}" for corpus in corpora]
    against = any(RATIO + corpus in shown for corpus in corpora)
    counts = {result.get("replicates") or 1 for result in results}
    grown = "grains" in shown and (frame["grains"].dropna() > 1).any()
    costs = [head for name, head in COSTS.items() if name in shown]
    counted = ", ".join(part for part in ("causal convention", profile) if part)
    saving = ", saving against the dense model" if "saving" in shown else ""
    under = [name.removeprefix("saving_") for name in shown if name.startswith("saving_")]
    memory = (
        f"Saving {', '.join(under)}: the same counts under that hardware profile." if under else ""
    )
    return sentences(
        f"{subject}.",
        f"Perplexity ± standard error over windows: {', '.join(texts)}." if texts else "",
        f"{DENSE[0].upper()}{DENSE[1:]}." if against else "",
        replicates(max(counts), any(name.endswith("_spread") for name in shown)),
        f"Accuracy ± standard error: {', '.join(questions)}." if questions else "",
        GRAINS if grown else "",
        *(f"{meaning[0].upper()}{meaning[1:]}." for n, meaning in MEANINGS.items() if n in shown),
        f"{', '.join(costs).capitalize()}: a window, {counted}{saving}." if costs else "",
        memory,
    )


def _windows(results: Sequence[Mapping[str, Any]], corpus: str) -> str:
    """The part of a corpus that was read, where the results say it."""
    read = [(result.get("evaluation") or {}).get(corpus) or {} for result in results]
    texts = [_part(m) for m in read if "windows" in m]
    return f" ({' or '.join(dict.fromkeys(texts))})" if texts else ""


def _questions(frame: pd.DataFrame, name: str) -> str:
    counts = sorted(frame[f"{name}_n"].dropna().unique()) if f"{name}_n" in frame else []
    number = "/".join(map(str, counts))
    return f"{name[4:]} ({counted(number, 'question')})" if number else name[4:]


def model(frame: pd.DataFrame) -> str:
    """The model and the transform, where all rows share them."""
    parts = [
        f"{name} {frame[name].iloc[0]}"
        for name in ("model", "transform")
        if name in frame and frame[name].nunique() == 1
    ]
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def perplexity(row: Row) -> str:
    """Which texts the perplexities, or their means, are over."""
    corpora = row.run.settings.evaluation.corpora
    over = f"Perplexity: {_mean(corpora)}{windows(row, corpora)}, ± standard error over windows"
    return sentences(f"{over}; {DENSE}.", replicates(row.result.get("replicates") or 1))


def replicates(count: int, shown: bool = False) -> str:
    """What several evaluations of a row are, and where their spread stands: in a column that is `shown`,
    or in the csv alone; nothing of one."""
    if count < 2:
        return ""
    place = "spread: their standard deviation" if shown else "the csv has their standard deviation"
    return (
        f"Means over {count} evaluations, all but the first with a relative perturbation of 2e-7 of the "
        f"embedding; {place}."
    )


def accuracy(row: Row) -> str:
    """Which questions the accuracies, or their means, are over."""
    settings = row.run.settings
    names = [settings.tasks[name].name for name in settings.evaluation.tasks]
    counts = [f"{name} ({counted(row.result[f'acc_{name}_n'], 'question')})" for name in names]
    return f"Accuracy: {_mean(names)}{', '.join(counts)}, ± standard error." if names else ""


def windows(row: Row, corpora: Sequence[str]) -> str:
    """The corpora with the part of them that is read."""
    measured = {name: row.result["evaluation"][name] for name in corpora}
    return ", ".join(f"{name} ({_part(m)})" for name, m in measured.items())


def _part(metrics: Mapping[str, Any]) -> str:
    every = "all " if metrics.get("all") else ""
    return f"{every}{counted(metrics['windows'], 'window')} of {metrics['length']} tokens"


def counted(number: object, what: str) -> str:
    """1 window, 8 windows."""
    return f"{number} {what}{'' if str(number) == '1' else 's'}"


def _mean(names: Sequence[str]) -> str:
    return "mean over " if len(names) > 1 else ""


def conversion(rows: Sequence[Row]) -> str:
    """What the seconds are of, and on which machines they passed."""
    machines = {
        row.run.artifacts["fitting"].manifest["machine"]["device"]
        for row in rows
        if "fitting" in row.run.artifacts
    }
    places = f" on {', '.join(sorted(machines))}" if machines else ""
    return f"Conversion: capture to patching, as measured when they were computed{places}."


def energy(row: Row) -> str:
    """What is counted, and the cost of an operation."""
    spec = row.run.settings.energy
    tokens = spec.tokens or row.run.settings.evaluation.length
    return (
        f"Prefill of {tokens} tokens, and one token decoded after them; {spec.main.name}: "
        f"{spec.main.mac:g} {spec.main.unit} a MAC, {spec.main.ac:g} {spec.main.unit} an AC. Of the "
        f"conventions {CONVENTIONS}"
    )


def published(sources: Sequence[str]) -> str:
    """The sources of published rows, by the number that marks them."""
    cited = "; ".join(f"[{number}] {source}" for number, source in enumerate(sources, 1))
    return (
        f"Published rows were not measured here: mean perplexity over {PUBLISHED[0]}, mean accuracy "
        f"over {PUBLISHED[1]}, conversion on their authors' machines; {cited}."
    )


def diverged(frame: pd.DataFrame) -> str:
    """The mark of diverged perplexities, where there are any."""
    perplexities = frame[[f"ppl_{corpus}" for corpus in measures(frame)[0]]]
    return f"{BEYOND}: diverged." if (perplexities > DIVERGED).any(axis=None) else ""


def sentences(*parts: str) -> str:
    """A caption of the parts that there are."""
    return " ".join(part for part in parts if part)
