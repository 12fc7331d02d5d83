"""Stage 5: perplexity with counters per site, and zero-shot accuracy, of a dense or spiking model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.errors import InputError
from stages.fitted import Conversion
from stages.model.forward import Windows, windows
from stages.model.offload import device_of, refuse_offloaded
from stages.model.perturbation import Perturbation, perturbed
from stages.model.shares import Part, Parts, Share, run_shares
from stages.model.sites import find_sites
from stages.ports.counters import Counters, decoding
from stages.text.answers import Answers, Portion
from stages.text.corpus import ALL
from stages.text.harness import TaskSpec, asking, zero_shot

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_PASSES = 256  # of a model after each step of its neurons
COUNTERS, WINDOWS = "counters.parquet", "windows.parquet"
# What the names of columns end with: a text or task whose name does would be taken for one.
ENDINGS = ("_se", "_spread", "_low", "_high", "_n")


@dataclass(frozen=True)
class Evaluation:
    """The first `windows` windows of `length` tokens of every corpus, or `all` whole ones, none of which
    overlap, and the first `items` questions of every task; `anytime` adds the perplexity after each step
    of the neurons.

    All of it is measured `replicates` times, of which the first is the model as it is and the others
    have a perturbation of their own.
    """

    corpora: tuple[str, ...]
    windows: int | Literal["all"]
    length: int
    tasks: tuple[str, ...]
    items: int
    anytime: bool
    replicates: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "corpora", tuple(self.corpora))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        enough = self.windows == ALL or (isinstance(self.windows, int) and self.windows >= 1)
        if not enough or self.length < 2 or self.items < 1 or not self.corpora:
            raise InputError(
                f"evaluation: got corpora={list(self.corpora)}, windows={self.windows}, "
                f"length={self.length}, items={self.items}; needs a corpus, 1 window of 2 tokens "
                f"(or windows={ALL}) and 1 item at least"
            )
        if self.replicates < 1:
            raise InputError(f"evaluation.replicates={self.replicates}: give 1 or more")
        self._check_names()

    def _check_names(self) -> None:
        """Raise InputError for names that would make two columns of one name."""
        if both := set(self.corpora) & set(self.tasks):
            raise InputError(
                f"{sorted(both)[0]} is in evaluation.corpora and in evaluation.tasks, and both have a "
                "column ratio_NAME: give one of them another name"
            )
        for option, names in (("corpora", self.corpora), ("tasks", self.tasks)):
            for name in names:
                if name.endswith(ENDINGS):
                    raise InputError(
                        f"evaluation.{option}: {name} ends with one of {', '.join(ENDINGS)}, as the "
                        "columns of its errors do: give it another name"
                    )

    @property
    def perturbations(self) -> tuple[Perturbation | None, ...]:
        """That of every replicate; more replicates leave the first ones as they are."""
        return (None, *(Perturbation(seed) for seed in range(1, self.replicates)))


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    Source: the protocol of GPTQ (Frantar et al. 2023) and its followers.
    `windows` has a row each: `window`, the sum `nll` of its tokens in nats, the number of `tokens`
    that are predicted. `counters` are empty where nothing was counted.
    """

    metrics: dict[str, Any]
    counters: pd.DataFrame
    windows: pd.DataFrame

    def save(self, folder: Path) -> None:
        (folder / "metrics.json").write_text(json.dumps(self.metrics, indent=1))
        self.counters.to_parquet(folder / COUNTERS)
        self.windows.to_parquet(folder / WINDOWS)

    @classmethod
    def load(cls, folder: Path) -> Perplexity:
        import pandas as pd

        metrics = json.loads((folder / "metrics.json").read_text())
        frames = (pd.read_parquet(folder / name) for name in (COUNTERS, WINDOWS))
        return cls(metrics, *frames)


def window_nll(folder: Path) -> np.ndarray:
    """The negative log-likelihood of a token in every window [W], in nats, as a folder holds it."""
    import pandas as pd

    return per_token(pd.read_parquet(folder / WINDOWS))


def per_token(windows: pd.DataFrame) -> np.ndarray:
    """The negative log-likelihood of a token in every window of such a table, in nats."""
    return (windows["nll"] / windows["tokens"]).to_numpy()


def perplexity(
    model: PreTrainedModel,
    ids: Tensor,
    conversion: Conversion | None,
    batch: int,
    corpus: str,
    execution: str = "fast",
    steps: int | None = None,
    perturbation: Perturbation | None = None,
    counted: bool = True,
) -> Perplexity:
    """Measure perplexity and counters on ids [windows, length]; a diverged model gives inf, no error.

    `execution` and `steps` are those of `stages.ports.patched.patched`; `perturbation` is that of a
    replicate. Where nothing is `counted` the same perplexity takes less time.
    """
    likelihoods = Likelihoods(conversion, corpus, execution, steps, perturbation, counted)
    return likelihoods.run(model, ids, batch)


@dataclass(frozen=True)
class Likelihoods:
    """How perplexity is measured, see `perplexity`."""

    conversion: Conversion | None
    corpus: str
    execution: str = "fast"
    steps: int | None = None
    perturbation: Perturbation | None = None
    counted: bool = True

    def run(self, model: PreTrainedModel, ids: Tensor, batch: int) -> Perplexity:
        """Measure ids [windows, length]."""
        counters = self._counters(model, device_of(model))
        sums: list[Tensor] = []  # they stay on the device until all windows have passed
        after = counters.close if counters is not None else lambda: None
        self._pass(model, ids, batch, counters, sums, after)
        return self._result(ids, torch.cat(sums).cpu(), counters)

    def run_shares(self, model: PreTrainedModel, shares: Iterable[Share]) -> None:
        """Measure batches by themselves; `merged` makes of their parts what `run` makes."""
        counters = self._counters(model, device_of(model))
        sums: list[Tensor] = []

        def take() -> Part:
            part = {"nll": torch.cat(sums).cpu()} if sums else {}
            sums.clear()
            return part if counters is None else part | {"sums": counters.take()}

        run_shares(
            model,
            shares,
            take,
            lambda batches, after: self._pass(model, batches, 0, counters, sums, after),
        )

    def merged(self, model: PreTrainedModel, ids: Tensor, parts: Parts) -> Perplexity:
        """The perplexity on ids [windows, length], of what all their batches have left."""
        counters, sums = self._counters(model, torch.device("cpu")), []
        for part in parts:
            sums.append(part["nll"])
            if counters is not None:
                counters.merge(part["sums"])
        return self._result(ids, torch.cat(sums), counters)

    def _counters(self, model: PreTrainedModel, device: torch.device) -> Counters | None:
        return Counters(find_sites(model), device) if self.counted else None

    def _pass(
        self,
        model: PreTrainedModel,
        ids: Windows,
        batch: int,
        counters: Counters | None,
        sums: list[Tensor],
        after: Callable[[], None],
    ) -> None:
        """Let windows pass, and add their likelihoods to `sums`."""
        from stages.ports.patched import patched  # takes seconds to import what it needs

        def add(tokens: Tensor, logits: Tensor) -> None:
            sums.append(negative_log_likelihood(logits, tokens))

        with (
            torch.inference_mode(),
            perturbed(model, self.perturbation),
            patched(model, self.conversion, counters, self.execution, self.steps),
        ):
            windows(model, ids, batch, f"perplexity {self.corpus}", consume=add, after=after)

    def _result(self, ids: Tensor, sums: Tensor, counters: Counters | None) -> Perplexity:
        import pandas as pd

        predicted = ids.shape[1] - 1
        nll = sums.numpy()
        mean = float((nll / predicted).mean())
        metrics = {
            "corpus": self.corpus,
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "nll": mean if math.isfinite(mean) else math.inf,
            "windows": ids.shape[0],
            "length": ids.shape[1],
            "tokens": ids.numel(),
            "ids_sha256": _sha256(ids),
        }
        if self.perturbation is not None:
            metrics["perturbation"] = asdict(self.perturbation)
        by_window = pd.DataFrame({"window": np.arange(len(nll)), "nll": nll, "tokens": predicted})
        counts = pd.DataFrame() if counters is None else counters.of(self.conversion)
        return Perplexity(metrics, counts, by_window)


def _sha256(ids: Tensor) -> str:
    """Of ids [windows, length] as int64, a window at a time."""
    hashed = hashlib.sha256()
    for window in ids:
        hashed.update(window.cpu().long().numpy().tobytes())
    return hashed.hexdigest()


def anytime(
    model: PreTrainedModel, ids: Tensor, conversion: Conversion, batch: int, corpus: str
) -> pd.DataFrame:
    """Measure ids [windows, length] after the first t steps of every neuron, t = 1 … those of the longest;
    the last is that of the fast path. A row for every step `t` and window, as in `Perplexity.windows`.

    Raises InputError where they take more than `MOST_PASSES` steps.
    """
    import pandas as pd

    every = range(1, longest(conversion) + 1)
    parts = [after_steps(t, model, ids, conversion, batch, corpus) for t in every]
    return pd.concat(parts, ignore_index=True)


def longest(conversion: Conversion) -> int:
    """The steps of the longest neuron of a conversion. Raises InputError for more than `MOST_PASSES`."""
    last = int(decoding(conversion)["steps"].max())
    if last > MOST_PASSES:
        raise InputError(
            f"evaluation.anytime=true runs the model once a step, and coding={conversion.coding.name} "
            f"takes {last} of them, more than {MOST_PASSES}: give fewer coding.timesteps, a smaller "
            "coding.radix where it has one, or evaluation.anytime=false"
        )
    return last


def after_steps(
    t: int, model: PreTrainedModel, ids: Tensor, conversion: Conversion, batch: int, corpus: str
) -> pd.DataFrame:
    """The rows of `anytime` after the first t steps."""
    steps = None if t == longest(conversion) else t
    result = perplexity(model, ids, conversion, batch, f"{corpus} t={t}", steps=steps)
    return result.windows.assign(t=t)


def negative_log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum over the next tokens of each window: logits [B, S, V], tokens [B, S] -> float64 [B]."""
    rows = logits[:, :-1].flatten(0, 1)
    targets = tokens[:, 1:].flatten()
    losses = [
        F.cross_entropy(part.float(), want, reduction="none")
        for part, want in zip(rows.split(512), targets.split(512), strict=True)
    ]
    return torch.cat(losses).view(len(tokens), -1).double().sum(-1)


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversion: Conversion | None,
    tasks: Sequence[tuple[TaskSpec, Path | None]],
    items: int,
    batch: int,
    execution: str = "fast",
    perturbation: Perturbation | None = None,
) -> dict[str, Answers]:
    """Measure zero-shot accuracy of every task on its first `items` questions, without counters: lm-eval
    pads on the right without a mask, and pads must not enter spike counts."""
    from stages.ports.patched import patched

    refuse_offloaded(model, "zero-shot accuracy", "use evaluation.tasks=[]")
    with perturbed(model, perturbation), patched(model, conversion, execution=execution):
        scores = zero_shot(model, tokenizer, tasks, items, batch)
    return {name: noted(score, perturbation) for name, score in scores.items()}


@contextmanager
def questioned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversion: Conversion | None,
    task: tuple[TaskSpec, Path | None],
    items: int,
    batch: int,
    execution: str = "fast",
    perturbation: Perturbation | None = None,
) -> Iterator[Callable[[int], Portion]]:
    """Give a function that asks one portion of the questions of `accuracy`, by its number from 0 on."""
    from stages.ports.patched import patched

    refuse_offloaded(model, "zero-shot accuracy", "use evaluation.tasks=[]")
    with (
        perturbed(model, perturbation),
        patched(model, conversion, execution=execution),
        asking(model, tokenizer, [task], batch) as (ask, _),
    ):
        yield lambda portion: ask(task[0], portion, items)


def noted(score: Answers, perturbation: Perturbation | None) -> Answers:
    """The accuracy of a replicate, which says so."""
    if perturbation is not None:
        score.metrics["perturbation"] = asdict(perturbation)
    return score
