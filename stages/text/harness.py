"""Zero-shot accuracy by lm-eval on a model in memory."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.errors import InputError
from stages.model.limits import check_tokens
from stages.model.prefix import prefix_length
from stages.model.products import products
from stages.model.sources import PackageFile
from stages.text.answers import AT_ONCE, Answers, Portion, portions
from stages.text.tasks import check_commit, pinned, yaml_of

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("acc", "acc_norm")
SPLITS = ("validation", "test")
_BUILDERS = {".jsonl": "json", ".gz": "json", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class TaskSpec:
    """One column of accuracies: lm-eval's `task`, scored by `metric` on `split` of its data.

    The data are the file `path`, or else the one in `package`, which then stands for that
    split; without either, the data set that lm-eval names, from the hub, of one commit.
    """

    name: str
    task: str
    metric: str = "acc_norm"
    split: str = "validation"
    path: str | None = None
    package: PackageFile | None = None

    def __post_init__(self) -> None:
        for field, got, allowed in (
            ("metric", self.metric, METRICS),
            ("split", self.split, SPLITS),
        ):
            if got not in allowed:
                raise InputError(
                    f"tasks.{self.name}.{field}: got {got!r}, needs one of {', '.join(allowed)}"
                )


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[tuple[TaskSpec, Path | None]],
    limit: int | None,
    batch_size: int,
) -> dict[str, Answers]:
    """Ask the first `limit` questions of each task's file (None: the hub's); the answers by its name.

    `AT_ONCE` questions at a time, so that another process may ask some of them: which of them share a
    batch moves last bits. lm-eval pads batches on the right without a mask, so counters that run
    meanwhile see the pads.
    """
    if limit is not None and limit < 1:
        raise InputError(f"items per zero-shot task: got {limit}, needs 1 or more, or null for all")
    if not tasks:
        return {}
    with asking(model, tokenizer, tasks, batch_size) as (ask, numbers):
        answered = {}
        for spec, _ in tasks:
            number = numbers[spec.name]
            count = portions(number if limit is None else min(limit, number))
            asked = (ask(spec, portion, limit) for portion in range(count))
            answered[spec.name] = Answers.joined(asked, spec.metric, spec.split)
        return answered


Ask = Callable[[TaskSpec, int, int | None], Portion]


@contextmanager
def asking(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[tuple[TaskSpec, Path | None]],
    batch_size: int,
) -> Iterator[tuple[Ask, dict[str, int]]]:
    """Give a function (task, number of the portion, limit) that asks, and the number of questions that
    every task's file has."""
    from lm_eval.evaluator import evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory(prefix="tasks-") as folder,
        _in_memory(model, tokenizer, batch_size) as lm,
    ):
        loaded = _load(tasks, Path(folder))["tasks"]
        numbers = {name: len(task.eval_docs) for name, task in loaded.items()}

        def ask(spec: TaskSpec, portion: int, limit: int | None) -> Portion:
            number = numbers[spec.name]
            end = number if limit is None else min(limit, number)
            asked = range(portion * AT_ONCE, min(end, (portion + 1) * AT_ONCE))
            if not asked and portion:
                return Portion.of([], 0.0, None)  # the file has fewer than the limit
            task = loaded[spec.name]
            # 0: without standard errors, of which that of lambada's perplexity needs two resamples.
            how: Any = {"bootstrap_iters": 0, "log_samples": True}
            results = evaluate(
                lm, {"tasks": {spec.name: task}}, samples={spec.name: [*asked]}, **how
            )
            return _portion(spec, task, results)

        yield ask, numbers


def check(spec: TaskSpec, data: Path | None, items: int) -> None:
    """Raise InputError where `zero_shot` would, an hour later: a task that lm-eval lacks, a metric
    that it lacks, a file in other columns, a right answer that is none of the choices."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="tasks-") as folder:
        task = _load([(spec, data)], Path(folder))["tasks"][spec.name]
        _check_metric(spec, task.aggregation())
        with _readable(spec, data):
            task.build_all_requests(limit=1, rank=0, world_size=1)
            for number, question in zip(range(items), task.eval_docs, strict=False):
                _check_answer(task, question, number)


def _check_metric(spec: TaskSpec, scored: Collection[str]) -> None:
    if spec.metric not in scored:
        raise InputError(
            f"tasks.{spec.name}.metric={spec.metric}: lm-eval's {spec.task} is scored by "
            f"{', '.join(scored)}"
        )


def _check_answer(task: Any, question: Any, number: int) -> None:
    """Raise ValueError where lm-eval would count every answer of a question as wrong."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    choices = list(task.doc_to_choice(question))
    right = task.doc_to_text(question) if task.multiple_input else task.doc_to_target(question)
    for each in right if isinstance(right, list) else [right]:
        allowed = range(len(choices)) if isinstance(each, int) else choices
        if each not in allowed:
            raise ValueError(
                f"question {number + 1} has {each!r} as its right answer, out of {len(choices)} choices"
            )


@contextmanager
def _readable(spec: TaskSpec, data: Path | None) -> Iterator[None]:
    """Turn what lm-eval and datasets raise for questions that they cannot read into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a bad file or no network shows as one of a dozen types
        reason = (str(error).strip().splitlines() or ["it is empty"])[0]
        raise InputError(
            f"questions of {spec.name} cannot be read from {data or 'the hub'}: {reason}{_head(data)};"
            f" give tasks.{spec.name}.path=FILE in the columns of that data set"
        ) from error


def _head(data: Path | None) -> str:
    """What a file has instead of the columns that a task reads; nothing where it has no rows."""
    import datasets

    if data is None:
        return ""
    try:
        file: Any = datasets.load_dataset(
            _BUILDERS[data.suffix], data_files=str(data), split="train", streaming=True
        )
        return f"; its first row has {', '.join(next(iter(file)))}"
    except Exception:  # it is what is being reported
        return ""


def _load(tasks: Sequence[tuple[TaskSpec, Path | None]], folder: Path) -> Any:
    """Load tasks of lm-eval, each by a file that includes its yaml and says where the data lie."""
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    manager = TaskManager(include_defaults=False)
    loaded: dict[str, Any] = {}
    for spec, data in tasks:
        file, config = folder / f"{spec.name}.yaml", _config(spec, data, folder)
        file.write_text(json.dumps(config))  # json is yaml
        with _readable(spec, data):
            if data is None:
                check_commit(config)
            loaded |= manager.load([str(file)])["tasks"]
    return {"tasks": loaded}


def _config(spec: TaskSpec, data: Path | None, folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {
        "include": yaml_of(spec.task),
        "task": spec.name,
        "num_fewshot": 0,
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        f"{spec.split}_split": spec.split,
    }
    if data is None:
        return config | pinned(spec.name, spec.task)
    if data.suffix not in _BUILDERS or not data.is_file():
        raise InputError(
            f"tasks.{spec.name}: {data} is no file with one of the suffixes {', '.join(_BUILDERS)}"
        )
    kwargs = {"data_files": {spec.split: str(data)}, "cache_dir": str(folder)}
    return config | {
        "dataset_path": _BUILDERS[data.suffix],
        "dataset_name": None,
        "dataset_kwargs": kwargs,
    }


@contextmanager
def _in_memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterator[HFLM]:
    """The model as lm-eval wants it, with log-likelihoods in float32 whatever the model's dtype is.

    HFLM calls `tie_weights`, which would undo a transform that has untied the embedding and the
    head, so that does nothing meanwhile.
    """
    from lm_eval.models.huggingface import HFLM

    model.tie_weights = lambda *args, **kwargs: None  # type: ignore[method-assign]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    if not sys.stderr.isatty():  # its progress bar is for people, and knows no terminal
        quiet = partial(lm.loglikelihood, disable_tqdm=True)
        lm.loglikelihood = quiet
    _check_requests(lm, model, tokenizer)
    try:
        with products(model):
            yield lm
    finally:
        del model.tie_weights


def _check_requests(lm: HFLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the scoring raise InputError for a question that the model cannot read: with a token that
    its embedding lacks, or longer than it has positions, which lm-eval would cut from the left."""
    embedding: Any = model.get_input_embeddings()
    most, score = lm.max_length - prefix_length(model), lm._loglikelihood_tokens

    def checked(requests: Any, *args: Any, **options: Any) -> Any:
        for _, context, continuation in requests:
            ids = [*context, *continuation]
            check_tokens(ids, embedding.num_embeddings, "a question", tokenizer)
            if len(ids) - 1 > most:  # the last token is not read
                raise InputError(
                    f"a question has {len(ids)} tokens, and the model {most} positions for it: leave "
                    "its task out of evaluation.tasks"
                )
        return score(requests, *args, **options)

    lm._loglikelihood_tokens = checked


def _portion(spec: TaskSpec, task: Any, results: Any) -> Portion:
    scores = results["results"][spec.name]
    _check_metric(spec, [name.partition(",")[0] for name in scores if name.endswith(",none")])
    unfiltered = (each for each in results["samples"][spec.name] if each["filter"] == "none")
    samples = sorted(unfiltered, key=lambda each: each["doc_id"])
    rows = [
        {
            "question": each["doc_id"],
            "correct": int(each[spec.metric]),
            "chosen": _chosen(spec, task, each),
        }
        for each in samples
    ]
    total = float(sum(each[spec.metric] for each in samples))
    return Portion.of(rows, total, results["versions"][spec.name])


def _chosen(spec: TaskSpec, task: Any, sample: Any) -> int:
    """The choice of the largest log-likelihood, for acc_norm over its characters, as lm-eval has it."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return int(sample[spec.metric])
    choices = task.doc_to_choice(sample["doc"])
    scores = np.array([likelihood for likelihood, _ in sample["filtered_resps"][: len(choices)]])
    if spec.metric == "acc_norm":
        scores = scores / np.array([len(choice) for choice in choices])
    return int(scores.argmax())
