"""Which process, of which machine, began what is not ended."""

from __future__ import annotations

import os
import socket

import psutil

CLOCK_SECONDS = 60  # by which the start of a process and of what it began may disagree


def this() -> str:
    """This process: its host and its number."""
    return f"{socket.gethostname()} {os.getpid()}"


def is_gone(process: str, since: float) -> bool:
    """Whether a process of this host that was there at a time, in seconds since 1970, no longer is.

    Another process may have its number by now. Of one of another host nothing is known: it is there.
    """
    host, _, number = process.partition(" ")
    if host != socket.gethostname():
        return False
    try:
        known = psutil.Process(int(number))
        return known.status() == psutil.STATUS_ZOMBIE or known.create_time() > since + CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True
