"""How kernels are compiled: torch.compile makes C++ on a CPU and Triton on a GPU of an expression.

Without a working compiler the same expression runs eagerly; `compiled()` says which it was.
"""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)


class _Compiler:
    """Whether this process compiles, and its first failure."""

    enabled = True
    failure: str | None = None


def use_compiler(enabled: bool, cache: Path | None = None) -> None:
    """Turn compilation on or off for this process; `cache` keeps compiled kernels on disk."""
    _Compiler.enabled = enabled
    if cache is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def compiled() -> bool:
    """Return whether all kernels are compiled, none eager."""
    return _Compiler.enabled and _Compiler.failure is None


def fused(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `kernel` for all shapes; it runs eagerly once the compiler has failed at it."""
    # Compilations are counted per code object, and all codings share the code of one closure; a
    # copy of it keeps one coding from using up the count of the others.
    copy = types.FunctionType(
        kernel.__code__.replace(), kernel.__globals__, kernel.__name__, None, kernel.__closure__
    )
    fast: Callable[..., Any] | None = (
        None  # with the first call: the compiler's import takes seconds
    )
    broken = False

    def call(*args: Any) -> Any:
        nonlocal broken, fast
        if broken or not _Compiler.enabled:
            return kernel(*args)
        fast = fast or torch.compile(copy, dynamic=True)
        try:
            return fast(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            broken = True
            if _Compiler.failure is None:
                _Compiler.failure = str(error).splitlines()[0]
                log.warning("not every kernel is compiled, some run eagerly: %s", _Compiler.failure)
            return kernel(*args)

    return call
