"""Figures of time and memory; nothing here is asserted."""

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result, what is queued on a GPU included."""
    _wait()
    start = time.perf_counter()
    value = work()
    _wait()
    return time.perf_counter() - start, value


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
