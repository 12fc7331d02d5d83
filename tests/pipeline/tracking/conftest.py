"""Databases that tests of tracking share, for a new one takes seconds."""

from pathlib import Path

import pytest

from pipeline.run.specs import TrackingSpec
from pipeline.tracking import database
from tests.pipeline.tracking.databases import local


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture
def spec(shared_folder, request) -> TrackingSpec:
    """Give each test its experiment in one database."""
    return local(shared_folder, request.node.name)


@pytest.fixture
def cold(tmp_path) -> TrackingSpec:
    return local(tmp_path, "test")


@pytest.fixture(autouse=True)
def nothing_lost(monkeypatch):
    """What a process remembers of servers that failed is not for the next test."""
    monkeypatch.setattr(database, "_lost", set())
