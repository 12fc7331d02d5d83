"""The one error that a user can cause."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something a user gave cannot be used; the message is one line.

    It says what was got, what is allowed and what to do. The command line prints
    it without a traceback; every other exception is a fault of this software.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """Ask whether one of the `names` nearest to an unknown one is meant; empty where none is near."""
    close = get_close_matches(name, list(dict.fromkeys(names)), n=2)
    return f"did you mean {' or '.join(close)}?" if close else ""
