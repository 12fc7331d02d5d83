"""`python -m pipeline` in processes that start in no time: forks of one that has imported everything.

It is a process of its own, as libraries read HF_ENDPOINT and the like when they are imported.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.pipeline.conftest import REPOSITORY, Finished

PRELOADED = (
    *("pipeline.commands.launch", "pipeline.commands.sweep", "pipeline.run.runner"),
    *("pyarrow.parquet", "datasets.load", "datasets.packaged_modules.json.json"),
    *("transformers.models.llama.modeling_llama", "accelerate", "lm_eval.evaluator"),
)


class Forked:
    """Commands in forks of one process; `environment` is what that was started with."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def run(self, cwd: Path, *arguments: str, **environment: str) -> Finished:
        """Run a command in the folder `cwd` to its end."""
        assert self._server.stdin is not None and self._server.stdout is not None
        cwd.mkdir(exist_ok=True)
        self._server.stdin.write(json.dumps([str(cwd), arguments, environment]) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return Finished(code, *((cwd / name).read_text() for name in ("out", "err")), cwd)


@contextmanager
def forked(environment: Mapping[str, str]) -> Iterator[Forked]:
    """The process that forks, which has imported what commands need."""
    more = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.forked"],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
        env=os.environ | more | environment,
        cwd=REPOSITORY,
    ) as server:
        yield Forked(server)
        assert server.stdin is not None
        server.stdin.close()


def _serve() -> None:
    from pipeline.commands.cli import main

    wait = time.sleep  # between attempts at what is broken, minutes in all
    time.sleep = lambda seconds: wait(min(seconds, 0.01))

    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            cwd, arguments, environment = json.loads(line)
            os.chdir(cwd)
            os.environ |= environment
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = ["pipeline", *arguments]
            code = 70  # of a traceback
            try:
                code = main()
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
