"""Which process, of which machine, began what is not ended."""

from __future__ import annotations

import os
import socket
from uuid import uuid4

import psutil

CLOCK_SECONDS = 60  # by which the start of a process and of what it began may disagree


def this() -> str:
    """This process: its host and its number."""
    return f"{socket.gethostname()} {os.getpid()}"


def is_here(process: str) -> bool:
    """Whether a process is one of this host."""
    return process.partition(" ")[0] == socket.gethostname()


def is_gone(process: str, since: float) -> bool:
    """Whether a process of this host that was there at a time, in seconds since 1970, no longer is.

    Another process may have its number by now. Of one of another host nothing is known: it is there.
    """
    if not is_here(process):
        return False
    try:
        known = psutil.Process(int(process.partition(" ")[2]))
        return known.status() == psutil.STATUS_ZOMBIE or known.create_time() > since + CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True


def file_name() -> str:
    """A name for what this process begins that no other has, on this machine or another that shares the
    folder."""
    return f"{this().replace(' ', '-')}-{uuid4().hex[:6]}"


def of_file(name: str) -> str | None:
    """The process that has given a `file_name`; None for another name."""
    host, number, *_ = *name.rsplit("-", 2), ""
    return f"{host} {number}" if number.isdigit() else None
