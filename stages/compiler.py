"""How kernels are compiled: torch.compile makes C++ on a CPU and Triton on a GPU of an expression.

Without a working compiler the same expression runs eagerly; `compiled()` says which it was. What no
expression says well is written in C++ (`native`).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
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


# Inductor stores what many operations read, booleans among them, which a vector kernel writes slowly: the
# code of a neuron is a third of the time where nothing is stored on the way.
ONE_PASS = {
    "realize_reads_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "realize_opcount_threshold": 10000,
}


# A kernel's functions and modules are what they were when it was compiled.
GUARDS = {"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe}


def fused(kernel: Callable[..., Any], one_pass: bool = False) -> Callable[..., Any]:
    """Compile `kernel` for all shapes; it runs eagerly once the compiler has failed at it.

    `one_pass`: nothing is stored between input and output, also what is then computed twice.
    """
    # Compilations are counted per code object, and all codings share the code of one closure; a
    # copy of it keeps one coding from using up the count of the others.
    copy = types.FunctionType(
        kernel.__code__.replace(), kernel.__globals__, kernel.__name__, None, kernel.__closure__
    )
    fast: Callable[..., Any] | None = (
        None  # with the first call: the compiler's import takes seconds
    )
    broken = False
    options: Any = GUARDS | (ONE_PASS if one_pass else {})

    def call(*args: Any, **named: Any) -> Any:
        nonlocal broken, fast
        if broken or not _Compiler.enabled:
            return kernel(*args, **named)
        fast = fast or torch.compile(copy, dynamic=True, options=options)
        try:
            return _specialised(fast, args, named)
        except torch._dynamo.exc.TorchDynamoException as error:
            broken = True
            if _Compiler.failure is None:
                _Compiler.failure = str(error).splitlines()[0]
                log.warning("not every kernel is compiled, some run eagerly: %s", _Compiler.failure)
            return kernel(*args, **named)

    return call


def _specialised(fast: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Call what torch.compile has made for all shapes, with the whole numbers of a coding as constants.

    As symbols, the power of two of its steps was computed anew for every vector of values.
    """
    config: Any = torch._dynamo.config
    before, config.specialize_int = config.specialize_int, True
    try:
        return fast(*args, **named)
    finally:
        config.specialize_int = before


# In front of all C++, to share out work: `each(n, threads, f)` calls f of 0 to n - 1, whichever thread is
# free the next. They are the threads of torch, by the name that the OpenMP which it has loaded gives them:
# a second OpenMP would have threads of its own, that wait for work beside those. Without it there is one.
_THREADS = """
typedef long long Size;
#ifdef __linux__
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
#endif
template <class F> static void each(Size n, int threads, F f) {
  Size next = 0;
  auto work = [&] {
    for (Size i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < n;) f(i);
  };
#ifdef __linux__
  if (threads > 1 && n > 1 && GOMP_parallel)
    return GOMP_parallel([](void* some) { (*(decltype(work)*)some)(); }, &work, threads, 0);
#endif
  work();
}
"""


def native(source: str, **functions: tuple[type, ...]) -> ctypes.CDLL | None:
    """Compile C++ for this processor, with `each` of `_THREADS` at hand; None where compilation is off or
    fails, which is logged once.

    `source`: functions with C linkage, without a library, that return nothing; `functions`: the types of
    the arguments of each by its name.
    """
    return _built(source, tuple(functions.items())) if _Compiler.enabled else None


@functools.cache
def _built(source: str, functions: tuple[tuple[str, tuple[type, ...]], ...]) -> ctypes.CDLL | None:
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        log.warning("no C++ compiler: what it would make runs in NumPy, with the same results")
        return None
    options = ("-x", "c++", "-", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = str(Path(folder) / "native.so")  # once loaded, it needs no file
        try:
            subprocess.run(
                [compiler, *options, "-o", library],
                input=_THREADS + source, text=True, check=True, capture_output=True,
            )  # fmt: skip
            built = ctypes.CDLL(library)
        except (OSError, subprocess.CalledProcessError) as error:
            fault = (getattr(error, "stderr", "").strip() or str(error)).splitlines()[0]
            log.warning("C++ is not compiled, NumPy runs instead: %s", fault)
            return None
    for name, arguments in functions:
        getattr(built, name).argtypes, getattr(built, name).restype = arguments, None
    return built
