"""Where a model or a text comes from; light, so that configs are read without torch."""

import re
from dataclasses import dataclass

from stages.errors import InputError


@dataclass(frozen=True)
class PackageFile:
    """One file inside a wheel of the Python package index.

    `member` is its name in the wheel, or a glob that one name matches;
    `sha256` is the digest of that file, 64 hex digits.
    """

    package: str
    version: str
    member: str
    sha256: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise InputError(f"sha256 of {self.package}: got {self.sha256!r}, needs 64 hex digits")
        if not re.fullmatch(r"[\w.-]+", self.package) or not re.fullmatch(
            r"[\w.+!-]+", self.version
        ):
            raise InputError(
                f"package: got {self.package!r} {self.version!r}, needs a name and an exact version"
            )


@dataclass(frozen=True)
class SplitFile(PackageFile):
    """A file too large for one wheel: `parts` are files of the wheels of so many packages, which joined
    in their order give the file `member`, whose digest `sha256` is; each has the version of the whole.

    `terms` are those of its author, printed when it is fetched.
    """

    parts: tuple[tuple[str, str], ...]  # (package, member)
    terms: str

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "parts", tuple((str(p), str(m)) for p, m in self.parts))
        if not self.parts:
            raise InputError(f"parts of {self.package}: got none, needs [package, member] of each")


@dataclass(frozen=True)
class ModelOrigin:
    """The model that a file in conf/model is about: `name`, and where it comes from unless the user
    gives another, `gguf` (a file in a wheel) or `hub` (an id there); null where neither is public."""

    name: str
    gguf: PackageFile | None
    hub: str | None

    def __post_init__(self) -> None:
        if self.gguf is not None and self.hub is not None:
            raise InputError(f"model.origin of {self.name}: give gguf or hub, the other is null")


@dataclass(frozen=True)
class HubText:
    """Text from the Hugging Face hub, read through `datasets`.

    `documents` is how many documents to take, from the first on (None = all). Where both splits
    are the same one, evaluation takes the first `documents` of it and calibration the next.
    """

    id: str
    config: str | None
    revision: str
    split: str
    calibration_split: str
    field: str
    documents: int | None

    def __post_init__(self) -> None:
        if self.documents is not None and self.documents < 1:
            raise InputError(
                f"documents of {self.id}: got {self.documents}, needs 1 or more, or null for all"
            )
        if self.documents is None and self.split == self.calibration_split:
            raise InputError(
                f"{self.id}: calibration and evaluation both take all of split {self.split!r};"
                " set `documents` or name two splits"
            )
