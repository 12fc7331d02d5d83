"""Memory of a process that makes the same large tensors again and again."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt, malloc.h
LARGEST = 1 << 26  # bytes of a tensor whose memory is kept
LARGEST_WEIGHT = 1 << 28  # where layers come from disk; head and embedding may be larger
ALLOWED = 1 << 25  # by a glibc that refuses more
KEPT = 1 << 30  # bytes that are kept at most


def keep_freed_memory(offloaded: bool = False) -> None:
    """Let glibc keep freed memory for the next tensor instead of giving it back to the system.

    A pass of 2048 tokens makes hundreds of tensors of some 10 MB, whose pages the system else fills
    with zeros each time; where a model is `offloaded`, every layer has the memory of the one before the
    last. Nothing happens where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return
    if not mallopt(_MMAP_THRESHOLD, LARGEST_WEIGHT if offloaded else LARGEST):
        mallopt(_MMAP_THRESHOLD, ALLOWED)
    mallopt(_TRIM_THRESHOLD, KEPT)
    if offloaded:  # the thread that reads weights keeps no memory of its own, at most 64 MB at once
        mallopt(_ARENA_MAX, 1)
