"""What a model answers to the questions of a task, and to some of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

QUESTIONS = "questions.parquet"
AT_ONCE = 32  # questions whose prompts share batches


@dataclass(frozen=True)
class Answers:
    """What a model answers to the questions of a task.

    `metrics`: `value`, the accuracy; `se`, its standard error, null for one question; `n`, `metric`,
    `split` and `version`. `questions` has a row each: `question`, `correct` (0 or 1), and `chosen`,
    the place of the answer that the metric takes; where a task has no choices that is `correct`.
    """

    metrics: dict[str, Any]
    questions: pd.DataFrame

    def save(self, folder: Path) -> None:
        (folder / "metrics.json").write_text(json.dumps(self.metrics, indent=1))
        self.questions.to_parquet(folder / QUESTIONS)

    @classmethod
    def joined(cls, portions: Iterable[Portion], metric: str, split: str) -> Answers:
        """The answers to all questions of a task, of their portions in order."""
        import pandas as pd

        asked = [portion for portion in portions if portion.number]
        questions = pd.concat([portion.questions for portion in asked], ignore_index=True)
        correct, number = questions["correct"].to_numpy(float), len(questions)
        metrics = {
            "value": sum(portion.total for portion in asked) / number,
            "se": float(correct.std(ddof=1) / math.sqrt(number)) if number > 1 else None,
            "n": number,
            "metric": metric,
            "split": split,
            "version": asked[0].version,
        }
        return cls(metrics, questions)


def answers(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Which questions [N] are answered rightly, and what is chosen, as a folder holds it."""
    import pandas as pd

    frame = pd.read_parquet(folder / QUESTIONS)
    return frame["correct"].to_numpy(float), frame["chosen"].to_numpy()


@dataclass(frozen=True)
class Portion:
    """The answers to `AT_ONCE` questions of a task, or to what is left: the sum of their scores, their
    number, the task's version (None without a question), and `questions` as in `Answers`."""

    total: float
    number: int
    version: Any
    questions: pd.DataFrame

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, int]], total: float, version: Any) -> Portion:
        import pandas as pd

        frame = pd.DataFrame(rows, columns=["question", "correct", "chosen"], dtype="int64")
        return cls(total, len(rows), version, frame)

    def save(self, folder: Path) -> None:
        known = {"total": self.total, "number": self.number, "version": self.version}
        (folder / "portion.json").write_text(json.dumps(known))
        self.questions.to_parquet(folder / QUESTIONS)

    @classmethod
    def load(cls, folder: Path) -> Portion:
        import pandas as pd

        known = json.loads((folder / "portion.json").read_text())
        return cls(questions=pd.read_parquet(folder / QUESTIONS), **known)


def portions(questions: int) -> int:
    """How many portions so many questions are, one for none."""
    return max(1, -(-questions // AT_ONCE))
