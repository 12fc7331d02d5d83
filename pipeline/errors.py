"""What a user reads when something is refused: one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from stages.errors import InputError

REFUSED = (HydraException, OmegaConfBaseException, InputError)  # what a user can mend


def told(command: Callable[[], object]) -> int:
    """Runs a command; the exit status, 1 where it is refused, which is told."""
    try:
        command()
    except REFUSED as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def one_line(error: BaseException) -> str:
    """What Hydra says, without its search path; what a stage said where it refused its fields."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: {str(error).splitlines()[0]}"
    if isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError):
        return f"unknown config key {error.__cause__.full_key}; --cfg job shows all keys"
    return " ".join(str(error).partition("Config search path")[0].split())
