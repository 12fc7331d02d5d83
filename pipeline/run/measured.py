"""What a run measured: its row in every table, its per-site table, and where each number lies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from pipeline.run.settings import Settings
from pipeline.store.store import Artifact
from stages.analysis import intervals
from stages.codings.base import Coding
from stages.energy import by_kind
from stages.evaluation import Perplexity, per_token, window_nll
from stages.text.answers import answers

if TYPE_CHECKING:
    import pandas as pd

LIBRARIES = ("torch", "transformers")
# The stages that run a model; the others compute on the processor with what these have left.
RUNNING = ("prefix", "capture", "statistics", "patching", "evaluation")
FITTING = ("statistics", "fitting")
CONVERSION = ("prefix", "capture", "distribution", "statistics", "fitting", "patching")
T = TypeVar("T")
U = TypeVar("U")
ANYTIME = "anytime.parquet"
KINDS, PARTS = "energy_by_kind.csv", "energy_by_part.csv"
BOOTSTRAP = intervals.Bootstrap()


def part(measure: str, name: str, replicate: int = 0, dense: bool = False) -> str:
    """What an evaluation is called in a run: `ppl_wikipedia`, `ppl_wikipedia 2`, `dense acc_piqa`."""
    words = ("dense" * dense, f"{measure}_{name}", str(replicate or ""))
    return " ".join(filter(None, words))


@dataclass(frozen=True)
class Evaluated(Generic[T]):
    """The evaluations of a model, by corpus and by task; of each its replicates, the first of which
    has no perturbation."""

    perplexities: Mapping[str, tuple[T, ...]]
    accuracies: Mapping[str, tuple[T, ...]]

    @classmethod
    def of(
        cls,
        corpora: Iterable[str],
        tasks: Iterable[str],
        replicates: int,
        get: Callable[[str], T],
        dense: bool = False,
    ) -> Evaluated[T]:
        """Every evaluation by its part of the run."""
        count = range(replicates)
        ppl = {n: tuple(get(part("ppl", n, r, dense)) for r in count) for n in corpora}
        acc = {n: tuple(get(part("acc", n, r, dense)) for r in count) for n in tasks}
        return Evaluated(ppl, acc)

    def __iter__(self) -> Iterator[T]:
        for each in (*self.perplexities.values(), *self.accuracies.values()):
            yield from each

    def map(self, change: Callable[[T], U]) -> Evaluated[U]:
        """The same with every stage replaced by what is made of it."""
        parts = (self.perplexities, self.accuracies)
        changed = [{n: tuple(map(change, each)) for n, each in part.items()} for part in parts]
        return Evaluated(*changed)


@dataclass(frozen=True)
class Measured(Generic[T]):
    """What a run measures: the stages, or the artifacts that they have left.

    `dense` is the same of the dense model, None where that is the model itself. The counters of the
    first corpus, without a perturbation, are those that tables and the energy use.
    """

    evaluated: Evaluated[T]
    energy: T
    patching: T | None = None  # None for the dense model
    anytime: T | None = None
    dense: Evaluated[T] | None = None

    def map(self, change: Callable[[T], U]) -> Measured[U]:
        """The same with every stage replaced by what is made of it."""
        return Measured(
            self.evaluated.map(change),
            change(self.energy),
            None if self.patching is None else change(self.patching),
            None if self.anytime is None else change(self.anytime),
            None if self.dense is None else self.dense.map(change),
        )


def per_site(measured: Measured[Artifact]) -> pd.DataFrame:
    """Counters of the first corpus, one row a site, with the error on held-out values and, of the
    calibration text, how far the error lies above the bound."""
    import pandas as pd

    first = next(iter(measured.evaluated.perplexities.values()))[0]
    frame = Perplexity.load(first.path).counters.drop(columns=["error", "power"])
    frame["spikes_per_value"] = frame["spikes"] / frame["values"]
    frame[["nmse", "bound_db"]] = np.nan
    if measured.patching is not None:
        converted = pd.read_parquet(measured.patching.path / "sites.parquet").set_index("site")
        for name in ("nmse", "bound_db"):
            frame[name] = frame["site"].map(converted[name])
    return frame


def energy_tables(measured: Measured[Artifact]) -> dict[str, pd.DataFrame]:
    """By the name of their files: cost of every kind of operation by convention and phase, what became
    additions and what stays; joules of every operation by hardware profile, part and event."""
    import pandas as pd

    kinds = by_kind(pd.read_parquet(measured.energy.path / "operations.parquet"))
    return {KINDS: kinds, PARTS: pd.read_parquet(measured.energy.path / "parts.parquet")}


def numbers(measured: Measured[Artifact], sites: pd.DataFrame) -> dict[str, Any]:
    """The measured columns of a table: perplexity, accuracy, error, spikes, energy of a prefill."""
    row: dict[str, Any] = {}
    dense = measured.dense
    for name, each in measured.evaluated.perplexities.items():
        row |= _perplexity(name, each, None if dense is None else dense.perplexities[name])
    for name, each in measured.evaluated.accuracies.items():
        row |= _accuracy(name, each, None if dense is None else dense.accuracies[name])
    coded = sites.dropna(subset=["acs"])
    fanout = float(coded["macs"].sum())
    row["nmse"] = geometric_mean(sites["nmse"])
    row["bound_db"] = weighted_mean(sites["bound_db"], sites["macs"])
    row["spikes_per_value"] = float(coded["acs"].sum()) / fanout if fanout else None
    row["steps"] = None if coded.empty else int(coded["steps"].max())
    return row | _energy(measured)["causal"]["prefill"]


def _perplexity(
    name: str, replicates: Sequence[Artifact], dense: Sequence[Artifact] | None
) -> dict[str, Any]:
    """The columns of a corpus, from the windows of every replicate [R, W]."""
    nll = np.stack([window_nll(each.path) for each in replicates])
    ratio = intervals.Ratio(None)
    if dense is not None:
        theirs = np.stack([window_nll(each.path) for each in dense])
        ratio = intervals.perplexity_ratio(nll, theirs, BOOTSTRAP)
    return _estimate(f"ppl_{name}", intervals.perplexity(nll)) | _ratio(name, ratio)


def _accuracy(
    name: str, replicates: Sequence[Artifact], dense: Sequence[Artifact] | None
) -> dict[str, Any]:
    """The columns of a task, from the questions of every replicate [R, N]."""
    correct, chosen = map(np.stack, zip(*(answers(each.path) for each in replicates), strict=True))
    ratio, changed = intervals.Ratio(None), None
    if dense is not None:
        right, theirs = map(np.stack, zip(*(answers(each.path) for each in dense), strict=True))
        ratio = intervals.accuracy_ratio(correct, right, BOOTSTRAP)
        changed = intervals.changed(chosen, theirs)
    columns = _estimate(f"acc_{name}", intervals.accuracy(correct))
    columns |= {f"acc_{name}_n": correct.shape[1]}
    return columns | _ratio(name, ratio) | {f"changed_{name}": changed}


def _anytime(artifact: Artifact) -> dict[str, dict[str, float | None]]:
    """The perplexity after every step by its number, and its standard error."""
    import pandas as pd

    steps = pd.read_parquet(artifact.path / ANYTIME).groupby("t")
    found = {str(t): intervals.perplexity(per_token(frame)[None]) for t, frame in steps}
    return {
        "anytime": {t: each.value for t, each in found.items()},
        "anytime_se": {t: each.se for t, each in found.items()},
    }


def _estimate(column: str, estimate: intervals.Estimate) -> dict[str, Any]:
    errors = {f"{column}_se": estimate.se, f"{column}_spread": estimate.spread}
    return {column: estimate.value} | errors


def _ratio(name: str, ratio: intervals.Ratio) -> dict[str, Any]:
    ends = {f"ratio_{name}_low": ratio.low, f"ratio_{name}_high": ratio.high}
    return {f"ratio_{name}": ratio.value} | ends


def row(
    settings: Settings,
    fingerprint: str,
    measured: Measured[Artifact],
    sites: pd.DataFrame,
    artifacts: Mapping[str, Artifact],
) -> dict[str, Any]:
    """Everything measured, as result.json keeps it: the columns of tables first.

    `artifacts` are all of the run by label, `fingerprint` that of its model.
    """
    columns = ("model", "transform", "coding", "row", "grains", "timesteps")
    result = {name: settings.axes[name] for name in columns} | _kind(settings.coding)
    result |= numbers(measured, sites)
    for name, stages in (("fitting_s", FITTING), ("conversion_s", CONVERSION)):
        seconds = [each.seconds for each in artifacts.values() if each.stage in stages]
        result[name] = round(sum(seconds), 3) if seconds else None
    if measured.anytime is not None:
        result |= _anytime(measured.anytime)
    energy = _energy(measured)
    return result | {
        "label": settings.name,
        "fingerprint": fingerprint[:8],
        "axes": settings.axes,
        "paper": energy["paper"]["prefill"],
        "decode": energy["causal"]["decode"],
        "paper_decode": energy["paper"]["decode"],
        "models": energy["models"],
        "replicates": settings.evaluation.replicates,
        "bootstrap": asdict(BOOTSTRAP),
        "evaluation": {
            name: _json(each[0], "metrics.json")
            for name, each in measured.evaluated.perplexities.items()
        },
        "seconds": {label: artifact.seconds for label, artifact in artifacts.items()},
        "hits": {label: artifact.hit for label, artifact in artifacts.items()},
        "keys": {label: artifact.key for label, artifact in artifacts.items()},
        "environments": environments(artifacts.values()),
    }


def _energy(measured: Measured[Artifact]) -> dict[str, Any]:
    """Cost, saving and break-even by convention and phase."""
    return _json(measured.energy, "summary.json")


def _json(artifact: Artifact, name: str) -> dict[str, Any]:
    return dict(json.loads((artifact.path / name).read_text()))


def environments(artifacts: Iterable[Artifact]) -> list[dict[str, str | None]]:
    """The distinct minor versions and devices that have computed these artifacts.

    Stages that run no model have no device, and count where their versions are like no other's.
    """
    distinct: list[dict[str, str | None]] = []
    for artifact in sorted(artifacts, key=lambda each: (each.stage not in RUNNING, each.stage)):
        built = artifact.manifest
        place = {name: _minor(built["versions"].get(name)) for name in LIBRARIES}
        if artifact.stage in RUNNING:
            place["device"] = built["machine"]["device"]
        if not any(place.items() <= other.items() for other in distinct):
            distinct.append(place)
    return distinct


def _minor(version: str | None) -> str | None:
    return None if version is None else ".".join(version.split("+")[0].split(".")[:2])


def _kind(coding: Coding) -> dict[str, Any]:
    """Bits of a code, how spikes are counted, whether trained."""
    if not coding.converts:
        return {"bits": None, "convention": None, "trained": None}
    return {
        "bits": coding.bits,
        "convention": coding.convention,
        "trained": coding.trained,
    }


def geometric_mean(values: pd.Series) -> float | None:
    """Of the values that are known; None without any."""
    known = values.dropna()
    if known.empty:
        return None
    return float(np.exp(np.log(known.clip(lower=1e-30)).mean()))


def weighted_mean(values: pd.Series, weights: pd.Series) -> float | None:
    """Of the values that are known; None without any."""
    known = values.notna()
    if not known.any():
        return None
    return float(np.average(values[known], weights=weights[known]))
