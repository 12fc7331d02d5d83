"""Machines, each with a cache of its own, and what they share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.store.objects import Objects
from pipeline.store.remote import Remote
from pipeline.store.shared import SharedStore
from pipeline.store.spec import StoreSpec
from tests.pipeline.store.machines import Machine


@pytest.fixture(params=["memory", "file"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An object store, and a folder that is used as one."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield "memory://shared/store" if request.param == "memory" else f"file://{tmp_path}/remote"
    MemoryFileSystem.store.clear()


@pytest.fixture
def machine(address: str, tmp_path: Path) -> Machine:
    """Makes the store as a machine of that name has it, with a cache of its own and without locks."""

    def make(name: str, lock: str = "none") -> SharedStore:
        store = StoreSpec(address, str(tmp_path / name), lock).open({"machine": name})
        assert isinstance(store, SharedStore)
        store.remote = Remote(Objects(address))  # that nothing was asked of
        return store

    return make
