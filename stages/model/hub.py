"""The Hugging Face hub: commits that branches stand for, files of a commit, refusals in one line."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from stages.errors import InputError

log = logging.getLogger(__name__)
Kind = Literal["model", "dataset"]
MAIN = "main"
SMALL = ("*.json", "*.model", "*.txt", "*.jinja")  # configs and tokenizers
WHOLE = (*SMALL, "*.safetensors")
_IGNORED = ["*/*", "consolidated*.safetensors"]  # the same weights in another layout
SHOWN = 12  # digits of a commit in logs
INSTEAD = {
    "model": "a folder on this machine is used by model.path=FOLDER",
    "dataset": "a file is used by corpus.NAME.path=FILE and corpus.NAME.calibration_path=FILE,"
    " of a task's questions by tasks.NAME.path=FILE",
}


@functools.cache
def commit(kind: Kind, name: str, revision: str | None) -> str:
    """Return the commit that a branch or tag of a repository stands for, the same for the whole process.

    One of 40 hex digits is itself, and the hub is not asked. Where the hub does not answer, it is the
    last commit that this machine has seen there, which is logged; so is a branch that has moved since.
    Raises InputError where the hub refuses, or does not answer and nothing is known.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.file_download import REGEX_COMMIT_HASH

    branch = revision or MAIN
    if REGEX_COMMIT_HASH.fullmatch(branch):
        return branch
    api, seen = HfApi(), _seen(kind, name, branch)
    with explained(kind, name, branch):
        try:
            now = api.repo_info(name, repo_type=kind, revision=branch).sha
        except Exception as error:
            if seen is None or not _unanswered(error):
                raise
            said = f"{kind} {name}: the hub cannot be reached"
            log.warning("%s; its %s is taken to be the last one seen, %s", said, branch, seen)
            return seen
        assert now is not None  # of a repository that exists
        if now != seen:
            now = api.resolve_revision(
                name, repo_type=kind, revision=branch
            ).resolved  # remembers it
        if seen is not None and now != seen:
            moved = f"{kind} {name}: {branch} has moved from {seen[:SHOWN]} to {now[:SHOWN]}"
            log.info("%s; what was made with it is made anew", moved)
    return now


def snapshot(name: str, revision: str | None, patterns: Sequence[str] = WHOLE) -> Path:
    """Return the folder with the files of a model that match, all of one commit, downloaded once.

    Raises InputError where one of them cannot be had whole.
    """
    from huggingface_hub import snapshot_download

    sha = commit("model", name, revision)
    with explained("model", name, revision or MAIN):
        folder = snapshot_download(
            name, revision=sha, allow_patterns=[*patterns], ignore_patterns=_IGNORED
        )
    return Path(folder)


def one_file(name: str, revision: str | None, file: str) -> Path:
    """Return a file of a model, downloaded once; InputError where the model has none of this name."""
    from huggingface_hub import hf_hub_download

    sha = commit("model", name, revision)
    with explained("model", name, revision or MAIN):
        return Path(hf_hub_download(name, file, revision=sha))


@contextmanager
def explained(kind: Kind, name: str, revision: str) -> Iterator[None]:
    """Turn what the hub's library raises into one line: what was asked, why not, what to do."""
    from huggingface_hub.errors import HTTPError, RevisionResolutionError
    from huggingface_hub.file_download import REGEX_COMMIT_HASH

    try:
        yield
    except InputError:
        raise
    except (HTTPError, RevisionResolutionError, OSError, ValueError) as error:
        shown = revision[:SHOWN] if REGEX_COMMIT_HASH.fullmatch(revision) else revision
        at = "" if revision == MAIN else f" at {shown}"
        raise InputError(
            f"{kind} {name}{at} on the hub: {reason(error)}; or {INSTEAD[kind]}"
        ) from error


def reason(error: BaseException) -> str:
    """Say why the hub gave nothing, and what to do, by the first error behind this one that tells."""
    from huggingface_hub import errors

    told = next((e for e in _behind(error) if isinstance(e, errors.HfHubHTTPError)), error)
    if isinstance(told, errors.HfHubHTTPError):
        return _refused(told)
    kinds = (errors.OfflineModeIsEnabled, errors.HTTPError)
    told = next((e for e in _behind(error) if isinstance(e, kinds)), error)
    if isinstance(told, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and this machine has it not, or not whole"
    if isinstance(told, errors.HTTPError):
        return (
            f"the connection failed ({first_line(told)}), and this machine has it not, or not whole"
        )
    return first_line(told).rstrip(".")


def _refused(error: object) -> str:
    """Why the hub, which answered, refused."""
    from huggingface_hub import errors

    assert isinstance(error, errors.HfHubHTTPError)
    status, asked = error.response.status_code, str(error.response.url)
    login = "log in by `hf auth login` or HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{asked.partition('/resolve/')[0].split('/', 3)[-1]}"
        if status == 401:
            return f"it is gated and you are not logged in: accept its terms on {page} and {login}"
        return f"it is gated and your token has no access to it: ask for it on {page}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such branch, tag or commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        private = f"it is private: {login}" if status == 401 else "your token has no access to it"
        return f"there is none of this name, or {private}"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"it has no file {asked.rpartition('/')[2]}"
    if status == 401:
        return f"your token is not valid: {login}"
    return f"it answers {status} ({first_line(error)})"


def _seen(kind: Kind, name: str, branch: str) -> str | None:
    """The commit of a branch when this machine last asked, None: never."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    try:
        found = HfApi().resolve_revision(
            name, repo_type=kind, revision=branch, local_files_only=True
        )
    except (RevisionResolutionError, HFValidationError):  # which asking the hub raises again
        return None
    return found.resolved


def _unanswered(error: Exception) -> bool:
    """Whether the hub did not answer, or only that it is down."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, HTTPError | OfflineModeIsEnabled)


def _behind(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it comes from, also where a library has hidden them."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def first_line(error: BaseException) -> str:
    """Of what an error says; with the next where that tells what is wrong."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.rstrip().endswith(":") else first
