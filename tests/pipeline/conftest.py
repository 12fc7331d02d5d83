"""A pipeline small enough to run end to end in a second: its model, its texts, its questions."""

from __future__ import annotations

import gc
import io
import json
import logging
import multiprocessing
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pipeline.run.settings import Settings

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
GROUPS = [path.name for path in CONF.iterdir() if path.is_dir()]


@dataclass(frozen=True)
class Tiny:
    """A folder with a model of random weights, disjoint texts and a file of questions."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def overrides(self) -> list[str]:
        """What makes a run tiny: 4 + 2 calibration and 3 evaluation windows of 48 tokens."""
        return [
            f"model.path={self.model}",
            "model.name=tiny",
            f"corpus.wikipedia.path={self.folder}/evaluation.jsonl",
            f"corpus.wikipedia.calibration_path={self.folder}/calibration.jsonl",
            *("calibration.windows=4", "calibration.length=48"),
            *("evaluation.windows=3", "evaluation.length=48"),
            *("evaluation.tasks=[]", f"tasks.piqa.path={self.folder}/piqa.jsonl"),
            *("evaluation.items=6", "distribution.atoms=64"),
            *("runtime.compile=false", "runtime.figures=false", "tracking.enabled=false"),
        ]


@dataclass(frozen=True)
class Finished:
    """What a command left behind: its exit status, its output, and its run folder's files."""

    code: int
    out: str
    err: str
    cwd: Path

    @property
    def runs(self) -> Path:
        (folder,) = re.findall(r"^results: (\S+)/\*/", self.out, re.MULTILINE)
        return self.cwd / folder

    @property
    def table(self) -> Path:
        """The main table's csv; its figures and other tables begin with the same name."""
        (stem,) = re.findall(r"^table: (\S+)\.md", self.out, re.MULTILINE)
        return self.cwd / f"{stem}.csv"

    @property
    def results(self) -> list[dict[str, Any]]:
        """The results of a sweep in the order of its jobs."""
        paths = sorted(self.runs.glob("*/result.json"), key=lambda p: int(p.parent.name))
        return [json.loads(path.read_text()) for path in paths]


@pytest.fixture(scope="session", autouse=True)
def configuration_files() -> Iterator[None]:
    from tests.pipeline.composing import parsed_once

    with parsed_once():
        yield


@pytest.fixture(scope="session")
def tiny_run(
    tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast
) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    byte_tokenizer.save_pretrained(folder / "model")
    _save_model(folder / "model")
    _write_text(folder / "calibration.jsonl", seed=1)
    _write_text(folder / "evaluation.jsonl", seed=2)
    rows = [
        {"goal": f"to {a}", "sol1": f"{a} then {b}", "sol2": f"{b} or {a}", "label": i % 2}
        for i, (a, b) in enumerate(zip(_words(3), _words(4), strict=True))
    ]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Tiny(folder)


def _write_text(path: Path, seed: int) -> None:
    """Six documents of pseudo-words, about 300 characters each."""
    draw, words = random.Random(seed), _words(seed)
    rows = ({"text": " ".join(draw.choices(words, k=60))} for _ in range(6))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _words(seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(40)]


def _save_model(folder: Path) -> None:
    """Two layers of grouped-query attention with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.15,
        bos_token_id=256,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def settings(tiny_run: Tiny) -> Callable[..., Settings]:
    """Makes the settings of a tiny run with its store in a folder, as the command line would."""
    from hydra.utils import instantiate

    from tests.pipeline.composing import COMPOSER, composing

    def make(store: Path, *overrides: str) -> Settings:
        with composing():
            config = COMPOSER(["experiment=none", *tiny_run.overrides, *overrides])
        config.store.path = str(store)
        return instantiate(config)

    return make


@pytest.fixture(scope="session")
def command(tiny_run: Tiny) -> Callable[..., Finished]:
    """Runs `python -m pipeline` in this process, which has imported everything already."""

    def run(cwd: Path, *overrides: str) -> Finished:
        flags = [override for override in overrides if override.startswith("-")]
        return main_in(cwd, [*flags, *tiny_run.overrides, *overrides[len(flags) :]])

    return run


def main_in(cwd: Path, arguments: Sequence[str]) -> Finished:
    """`python -m pipeline` in a folder; leaves environment, logging and compiler as they were."""
    from pipeline.commands.cli import main
    from pipeline.commands.launch import RUN_ID
    from stages.compiler import compiled, use_compiler

    gc.collect()
    gc.freeze()  # a command that fails looks for garbage: among what it has made alone
    compiles, root = compiled(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ), mock.patch.object(sys, "argv", ["pipeline", *arguments]):
        os.environ.pop(RUN_ID, None)
        try:
            with chdir(cwd), redirect_stdout(out), redirect_stderr(err):
                code = main()
        finally:
            root.handlers[:], root.level = handlers, level
            use_compiler(compiles)
    return Finished(code, out.getvalue(), err.getvalue(), cwd)


@contextmanager
def fork_server(*preloaded: str) -> Iterator[ForkServerContext]:
    """Processes that start in no time: forks of one that has imported everything, without threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{Path(__file__).parent}")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield context


def half_written(store: Path) -> list[str]:
    """What an interrupted or failed build must not leave: temporary folders, no or bad manifests."""
    from pipeline.store import manifest

    found = [str(path) for path in store.glob("*/.tmp-*")]
    for folder in store.glob("[!.]*/[!.]*"):
        try:
            manifest.verified(folder, full=True)
        except manifest.Damaged as fault:
            found.append(f"{folder}: {fault}")
    return found
