"""Which model a configuration means, what it is called, and its config before any weight is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError
from stages.model.loading import DTYPES, configuration, dims_config
from stages.model.sources import ModelOrigin, PackageFile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TEXTS = ("name", "path", "hub", "revision")  # fields that are text or null


@dataclass(frozen=True)
class ModelSpec:
    """The model of the folder `path` or of the id `hub`, or where neither is given that of `origin`.

    Afterwards exactly one of `path`, `hub` and `gguf` says where its weights are, and `name` what it
    is called: what is given, or else the folder's name, the last part of the id, the origin's name.
    `dims` are the published dimensions of `origin`, as in config.json and with `model_type`; they
    stand in for its weights where only shapes are needed. `revision` and `device_map` go to the hub
    and to accelerate as they are. `begin` is a token that stands in front of every window of text.
    `positions` is how many tokens a text may have, null: as many as its config says.
    """

    name: str | None
    path: str | None
    hub: str | None
    revision: str | None
    dtype: str
    device_map: str | None
    dims: Mapping[str, Any]
    origin: ModelOrigin | None = None
    begin: int | None = None
    positions: int | None = None
    gguf: PackageFile | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._check_texts()
        self._check_numbers()
        for name, value in self._resolved().items():
            object.__setattr__(self, name, value)
        if self.hub is not None and Path(self.hub).expanduser().is_dir():
            raise InputError(  # which transformers would load, under the key of the hub's
                f"model.hub={self.hub} is a folder here: give model.path={self.hub}"
            )
        if self.revision is not None and self.hub is None:
            raise InputError(
                f"model.revision={self.revision}: {self.name} does not come from the hub; give "
                "model.hub=ID, or model.revision=null"
            )

    def _check_texts(self) -> None:
        for name in TEXTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise InputError(
                    f"model.{name}={value!r}: give a text, in quotes where it looks like a number, "
                    "or null"
                )
        if self.path is not None and self.hub is not None:
            raise InputError(
                f"model.path={self.path} and model.hub={self.hub}: give one of the two"
            )
        if self.path is not None and not Path(self.path).expanduser().is_dir():
            raise InputError(f"model.path: {self.path} is not a folder")

    def _check_numbers(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"model.dtype: got {self.dtype!r}, needs one of {', '.join(DTYPES)}")
        if self.dims and "model_type" not in self.dims:
            raise InputError("model.dims name no model_type, for example model_type: llama")
        if self.begin is not None and type(self.begin) is not int:
            raise InputError(f"model.begin={self.begin!r}: give the id of a token, or null")
        if self.positions is not None and (type(self.positions) is not int or self.positions < 2):
            raise InputError(
                f"model.positions={self.positions!r}: give the number of tokens that a text may "
                "have, 2 or more, or null"
            )

    def _resolved(self) -> dict[str, Any]:
        """The one source, the name, and the dimensions if they are that source's."""
        if self.path is not None:
            return {"name": self.name or folder_name(self.path), "dims": {}}
        origin = self.origin
        if self.hub is not None and (origin is None or self.hub != origin.hub):
            return {"name": self.name or self.hub.rstrip("/").rpartition("/")[2], "dims": {}}
        if origin is None:
            if not self.dims:
                raise InputError("model has no source; give model.path=FOLDER")
            return {"name": self.name or self.dims["model_type"]}
        return {"name": self.name or origin.name, "hub": origin.hub, "gguf": origin.gguf}

    def check_begin(self, vocabulary: int) -> None:
        """Raise InputError if the model has no token `begin`."""
        if self.begin is not None and not 0 <= self.begin < vocabulary:
            raise InputError(
                f"model.begin={self.begin}: {self.name} has the tokens 0 to {vocabulary - 1}"
            )

    def config(self) -> PreTrainedConfig:
        """Return its config: that of its folder, its published dimensions, or the hub's."""
        if self.path is not None:
            return configuration(self.path, None)
        if self.hub is not None and not self.dims:
            return configuration(self.hub, self.revision)
        return dims_config(self.dims or {})


def folder_name(path: str) -> str:
    """Name the model of a folder: as the folder, or in the hub's cache as on the hub."""
    parts = Path(os.path.abspath(Path(path).expanduser())).parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].rpartition("--")[2]  # of models--ORG--NAME/snapshots/COMMIT
    return parts[-1]
