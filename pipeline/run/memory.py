"""Memory of a process that makes the same large tensors again and again."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, malloc.h
LARGEST = 1 << 26  # bytes of a tensor whose memory is kept
KEPT = 1 << 30  # bytes that are kept at most


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of giving it back to the system.

    A pass of 2048 tokens makes hundreds of tensors of some 10 MB, whose pages the system else fills
    with zeros each time. Nothing happens where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return
    mallopt(_MMAP_THRESHOLD, LARGEST)
    mallopt(_TRIM_THRESHOLD, KEPT)
