"""Files under an address that fsspec knows, `s3://BUCKET/FOLDER`, with one kind of error.

Credentials and endpoints are fsspec's: its configuration, or what the library behind a protocol reads.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from stages.errors import InputError

# Where a file is there whole or not at all, and folders need not be made.
OBJECTS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory")
LOCAL = ("file", "local")
MODIFIED = ("LastModified", "mtime", "updated", "last_modified", "created")  # in fsspec's infos
REFUSED = (409, 412)  # of HTTP: another writes it at this moment, or has written it
TRIALS = ".trials"
for _library in ("aiobotocore", "botocore"):  # which tell where they have found credentials
    logging.getLogger(_library).setLevel(logging.WARNING)


class Away(Exception):
    """The other side does not answer, or refuses; in one line."""


class Objects:
    """Files below an address, by their paths relative to it. Raises Away for every error but absence."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.protocol = address.partition("://")[0]

    @property
    def _fs(self) -> Any:
        """The file system, which fsspec keeps for each thread, and makes again after a fork."""
        options = {"auto_mkdir": True} if self.protocol in LOCAL else {}
        return _opened(self.address, **options)[0]

    @functools.cached_property
    def _root(self) -> str:
        return str(_opened(self.address)[1]).rstrip("/")

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    @property
    def atomic(self) -> bool:
        """Whether a file that is written is there whole or not at all."""
        return self.protocol in OBJECTS

    @property
    def absent(self) -> bool:
        """Whether there is nothing at the address, not even a bucket."""
        with self._asking():
            self._fs.invalidate_cache()
            try:
                return not self._fs.ls(self._path(""), detail=False)
            except FileNotFoundError:
                return True

    @functools.cached_property
    def creates(self) -> bool:
        """Whether a file can be created only where it is not there. It is tried out, as a server that does
        not know the condition overwrites, and other file systems look first and write then."""
        if not self.atomic:
            return self.protocol in LOCAL
        path = f"{TRIALS}/{uuid4().hex}"
        self.write(path, b"1")
        try:
            return not self.create(path, b"2")
        except Away:  # a server that knows no such header
            return False
        finally:
            self.delete(path)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file that is not there; False where it is."""
        with self._writing():
            try:
                if self.protocol in LOCAL:  # fsspec would look first and write then
                    with self._fs.open(self._path(path), "xb") as stream:
                        stream.write(data)
                else:
                    self._fs.pipe_file(self._path(path), data, mode="create")
            except Exception as error:
                if _refused(error):
                    return False
                raise
        return True

    def write(self, path: str, data: bytes) -> None:
        with self._writing():
            self._make_folders([path])
            self._fs.pipe_file(self._path(path), data)

    def rename(self, path: str, to: str) -> None:
        with self._writing():
            self._fs.mv(self._path(path), self._path(to))

    def put(self, files: Mapping[str, Path]) -> None:
        """Upload files, by the paths that they get."""
        with self._writing():
            self._make_folders([*files])
            if files:
                self._fs.put([*map(str, files.values())], [self._path(path) for path in files])

    def get(self, files: Mapping[str, Path]) -> None:
        """Download files to places whose folders are there; FileNotFoundError where one is absent."""
        with self._asking():
            if files:
                self._fs.get([self._path(path) for path in files], [*map(str, files.values())])

    def read(self, path: str) -> bytes | None:
        """The content of a file; None where it is absent."""
        with self._asking():
            try:
                return bytes(self._fs.cat_file(self._path(path)))
            except FileNotFoundError:
                return None

    def read_all(self, paths: Sequence[str]) -> list[bytes | None]:
        """The contents of several files at once."""
        if not paths:
            return []
        places = [self._path(path) for path in paths]
        with self._asking():
            got = self._fs.cat(places, on_error="return")
            contents = [got.get(p) for p in places] if isinstance(got, dict) else [got]
            for content in contents:
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
        return [content if isinstance(content, bytes) else None for content in contents]

    def names(self, folder: str) -> list[str]:
        """What is in a folder; nothing where it is absent."""
        with self._asking():
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
        return sorted({PurePosixPath(entry.rstrip("/")).name for entry in entries})

    def ages(self, folder: str) -> dict[str, float]:
        """All files below a folder, by their paths in it: seconds since each was written, by the clock of
        the server against the one here."""
        with self._asking():
            self._fs.invalidate_cache()
            try:
                files = self._fs.find(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
        start = len(self._path(folder)) + 1
        below = {path[start:]: info for path, info in files.items() if info["type"] == "file"}
        return {path: _age(info) for path, info in below.items() if path}

    def delete(self, path: str) -> None:
        """Delete a file, where it is there."""
        with self._asking(), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(path))

    def delete_folder(self, folder: str) -> None:
        with self._asking(), suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            self._fs.rm(self._path(folder), recursive=True)

    @functools.cached_property
    def takes(self) -> bool:
        """That files can be written. Raises InputError where the address does not answer, is not there, or
        refuses."""
        path = f"{TRIALS}/{uuid4().hex}"
        try:
            self.write(path, b"")
            self.delete(path)
        except Away as fault:
            raise InputError(
                f"store.path={fault}. Nothing has begun; see to the address, or to endpoint and "
                "credentials, which are fsspec's (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …)"
            ) from None
        return True

    def _make_folders(self, paths: Sequence[str]) -> None:
        if not self.atomic:  # in an object store this would make buckets
            for folder in sorted({self._path(path).rpartition("/")[0] for path in paths}):
                self._fs.makedirs(folder, exist_ok=True)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Every file system has errors of its own: turns them into Away, except the absence of a file."""
        try:
            yield
        except (Away, FileNotFoundError):
            raise
        except Exception as error:
            raise Away(f"{self.address}: {_line(error)}") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The same, where absence is that of the bucket, or of a folder."""
        try:
            with self._asking():
                yield
        except FileNotFoundError as error:
            raise Away(f"{self.address}: {_line(error)}") from error


def _opened(address: str, **options: Any) -> tuple[Any, str]:
    """The file system of an address, and the path there."""
    from fsspec.core import url_to_fs  # which a store in a folder does not wait for

    fs, path = url_to_fs(address, **options)
    return fs, path


def known(address: str) -> None:
    """Raises InputError for an address of a protocol that fsspec lacks, or whose library is not there."""
    import fsspec

    protocol = address.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise InputError(
            f"store.path={address}: fsspec knows no {protocol}://; give a folder, or s3://BUCKET/FOLDER"
        ) from None
    except ImportError as error:
        how = "python -m pip install -c constraints.txt -e .[s3]" if protocol == "s3" else error
        raise InputError(f"store.path={address}: a library is missing: {how}") from None


def _refused(error: Exception) -> bool:
    """Whether a file was not created since it is there; s3fs has no error of its own for that."""
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return isinstance(error, FileExistsError) or status in REFUSED


def _age(info: Mapping[str, Any]) -> float:
    """Seconds since a file was written; 0 where its file system does not say."""
    now = datetime.now(UTC)
    written = next((info[name] for name in MODIFIED if name in info), now)
    if isinstance(written, int | float):
        written = datetime.fromtimestamp(written, UTC)
    if not isinstance(written, datetime):
        return 0.0
    return (now - (written if written.tzinfo else written.replace(tzinfo=UTC))).total_seconds()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    name = type(error).__name__
    return f"{name}: {text}" if text else name
