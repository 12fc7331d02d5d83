"""Failed jobs: the reason in a line, and nothing of them in memory."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.run.errors import REFUSED, one_line

log = logging.getLogger(__name__)
INTERRUPTED = threading.Event()


@contextmanager
def interruptible() -> Iterator[None]:
    """Remembers a Ctrl-C: a library may take its KeyboardInterrupt for an error of its own."""

    def interrupt(number: int, frame: object) -> None:
        INTERRUPTED.set()
        raise KeyboardInterrupt

    INTERRUPTED.clear()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where it is ignored, as behind nohup
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def reason(error: Exception) -> str:
    """Why a job failed, in a line; what no user can mend is logged with its traceback.

    Raises KeyboardInterrupt if that is what the error comes from. To be called where it is caught.
    """
    if INTERRUPTED.is_set():
        raise KeyboardInterrupt from error
    if isinstance(error, REFUSED):
        return one_line(error)
    where = _to_files("job failed", error)
    if where is None:
        log.error("job failed", exc_info=error)
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{line}; the traceback is in {where}" if where else line


def record(line: str, swept: bool) -> None:
    """Log the reason; the terminal shows it at the end of the run, of a sweep's job at once as well."""
    if swept:  # which may go on for hours
        log.error("%s", line)
    else:
        _to_files(line)


def _to_files(line: str, error: Exception | None = None) -> str | None:
    """Logs an error to files alone, with its traceback if one is given; the first of them."""
    files = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
    raised = None if error is None else (type(error), error, error.__traceback__)
    entry = log.makeRecord(log.name, logging.ERROR, __file__, 0, line, (), raised)
    for handler in files:
        handler.handle(entry)
    return os.path.relpath(files[0].baseFilename) if files else None


def release(error: BaseException) -> None:
    """Frees what a failed job held, for the next: the frames of its error still have the model."""
    import torch

    from pipeline.run import models

    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    models.forget()
    gc.collect()
    torch.cuda.empty_cache()


def stopped(error: Exception) -> dict[str, Any]:
    """What ended a launcher before all jobs had run: no plug-in, a killed worker, a lost cluster."""
    log.debug("launcher", exc_info=error)
    missing = re.match(r"Unknown plugin class : 'hydra_plugins\.(\w+)", str(error))
    if missing:
        line = f"{missing[1]} is not installed; the launcher's file in conf/hydra/launcher says how"
    elif isinstance(error, OSError) and error.filename is not None:
        line = one_line(error)
    else:
        first = (str(error).strip().splitlines() or [""])[0]
        line = f"{type(error).__name__}: {first}; hydra.verbose=true tells more"
    return {"overrides": ["hydra/launcher"], "error": line}
