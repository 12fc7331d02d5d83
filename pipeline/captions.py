"""What stands over the paper's tables: what the numbers are over, and how to read them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from pipeline.columns import BEYOND, DIVERGED
from pipeline.lookup import Row

BEST = "Bold: the best of its T among the spiking models that did not diverge."
CONVENTIONS = (
    "the paper's counts the full attention square and one spiking operand a product; the causal one "
    "unmasked positions, both operands, gates and decode scaling. Saving: against the dense model in "
    "the same convention."
)
GRAINS = (
    "n: grains of steps in time for multigrain; for gated neurons an activation, which are log2 n "
    "bits more."
)

PUBLISHED = ("wikitext2, c4, redpajama and pile", "winogrande, arc_challenge, arc_easy and piqa")


def model(frame: pd.DataFrame) -> str:
    """The model and the transform, where all rows share them."""
    told = [
        f"{name} {frame[name].iloc[0]}"
        for name in ("model", "transform")
        if name in frame and frame[name].nunique() == 1
    ]
    text = ", ".join(told)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def perplexity(row: Row) -> str:
    """Which texts the perplexities, or their means, are over."""
    corpora = row.run.settings.evaluation.corpora
    return f"Perplexity: {_mean(corpora)}{windows(row, corpora)}."


def accuracy(row: Row) -> str:
    """Which questions the accuracies, or their means, are over."""
    settings = row.run.settings
    names = [settings.tasks[name].name for name in settings.evaluation.tasks]
    counts = [f"{name} ({row.result[f'acc_{name}_n']} questions)" for name in names]
    return f"Accuracy: {_mean(names)}{', '.join(counts)}, ± standard error." if names else ""


def windows(row: Row, corpora: Sequence[str]) -> str:
    """The corpora with the part of them that is read."""
    measured = {name: row.result["evaluation"][name] for name in corpora}
    return ", ".join(
        f"{name} ({m['windows']} windows of {m['length']} tokens)" for name, m in measured.items()
    )


def _mean(names: Sequence[str]) -> str:
    return "mean over " if len(names) > 1 else ""


def conversion(rows: Sequence[Row]) -> str:
    """What the seconds are of, and on which machines they passed."""
    machines = {
        row.run.artifacts["fitting"].manifest["machine"]["device"]
        for row in rows
        if "fitting" in row.run.artifacts
    }
    told = f" on {', '.join(sorted(machines))}" if machines else ""
    return f"Conversion: capture to patching, as measured when they were computed{told}."


def energy(row: Row) -> str:
    """What is counted, and the cost of an operation."""
    spec = row.run.settings.energy
    tokens = spec.tokens or row.run.settings.evaluation.length
    return (
        f"Prefill of {tokens} tokens, and one token decoded after them; {spec.profile.name}: "
        f"{spec.profile.mac_pj:g} pJ a MAC, {spec.profile.ac_pj:g} pJ an AC. Of the "
        f"conventions {CONVENTIONS}"
    )


def published(sources: Sequence[str]) -> str:
    """Where published rows were found, by the number that marks them."""
    told = "; ".join(f"[{number}] {source}" for number, source in enumerate(sources, 1))
    return (
        f"Published rows were not measured here: mean perplexity over {PUBLISHED[0]}, mean accuracy "
        f"over {PUBLISHED[1]}, conversion on their authors' machines; {told}."
    )


def diverged(frame: pd.DataFrame) -> str:
    """The mark of diverged perplexities, where there are any."""
    perplexities = frame[[name for name in frame if str(name).startswith("ppl_")]]
    return f"{BEYOND}: diverged." if (perplexities > DIVERGED).any(axis=None) else ""


def told(*parts: str) -> str:
    """A caption of the parts that there are."""
    return " ".join(part for part in parts if part)
