"""What a user reads when a configuration is refused: one line."""

from __future__ import annotations

from hydra.errors import OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from stages.errors import InputError


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
