"""Where runs are logged, as the configuration says it; no MLflow is needed to read that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from stages.errors import InputError

SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")


@dataclass(frozen=True)
class TrackingSpec:
    """Where runs are logged: `sqlite:///outputs/mlflow/mlflow.db` or a server's address.

    `artifacts` is the folder of the tables and figures beside a database, which may move with it; a
    server uses its own.
    `patience` is how many seconds logging one run may take before it is left to a later sync.
    Raises InputError for an address that MLflow cannot log to.
    """

    uri: str
    experiment: str
    artifacts: str
    enabled: bool = True
    patience: float = 20.0

    def __post_init__(self) -> None:
        scheme = urlsplit(self.uri).scheme.partition("+")[0]
        if scheme not in SCHEMES or (scheme == "sqlite" and self.database is None):
            raise InputError(
                f"tracking.uri={self.uri} names no file or server of {', '.join(SCHEMES)}: give "
                "sqlite:///FOLDER/mlflow.db or a server's address"
            )

    @property
    def database(self) -> Path | None:
        """The file of a sqlite database; None of a server."""
        parts = urlsplit(self.uri)
        named = parts.scheme.startswith("sqlite") and parts.path[1:]
        return Path(named) if named else None
