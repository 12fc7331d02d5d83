"""What is written down about where a result comes from."""

import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from pipeline.store import provenance

UNKNOWN = {"revision": None, "dirty": None}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source tree that takes the place of this one."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    provenance.git_state.cache_clear()
    yield tmp_path
    provenance.git_state.cache_clear()


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit(root: Path) -> str:
    git(root, "init")
    git(root, "commit", "--allow-empty", "-m", "first")
    return git(root, "rev-parse", "HEAD")


def test_versions_are_those_installed() -> None:
    found = provenance.versions()
    assert found["hydra-core"] == metadata.version("hydra-core")
    assert {"python", "torch", "transformers", "lm-eval", "mlflow"} <= found.keys()


def test_revision_and_state_of_a_repository(root: Path) -> None:
    revision = commit(root)
    assert provenance.git_state() == {"revision": revision, "dirty": False}
    provenance.git_state.cache_clear()
    (root / "new.py").write_text("1")
    assert provenance.git_state() == {"revision": revision, "dirty": True}


def test_no_repository_no_state(root: Path) -> None:
    assert provenance.git_state() == UNKNOWN


def test_another_repository_around_this_tree_does_not_count(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(root)
    (root / "site-packages").mkdir()
    monkeypatch.setattr(provenance, "ROOT", root / "site-packages")
    assert provenance.git_state() == UNKNOWN


def test_no_git_no_state(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(root)
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state() == UNKNOWN
