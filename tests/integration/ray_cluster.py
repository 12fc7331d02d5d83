"""Ray, on a cluster of its own and on one that runs: a sweep, and one conversion on two nodes.

No part of the test suite (its name has no test_). `conf/hydra/launcher/ray.yaml` says how to install:

    python -m pytest -s tests/integration/ray_cluster.py
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline.conftest import Finished

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a cluster of one node, two cores, in the folder of the sweep."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = ["--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    head = node(tmp_path, *options)
    deadline = time.monotonic() + 120
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert head.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    yield f"127.0.0.1:{port}"
    head.terminate()
    head.wait(60)


def node(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("ray")), "start", *options]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled"}
    environment.pop("PIPELINE_RUN_ID", None)
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would write one to the home folder."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def test_a_sweep_on_a_cluster_of_its_own(sweep: Callable[..., Finished]) -> None:
    sweep("hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2")


def test_a_sweep_on_a_cluster_that_runs(address: str, sweep: Callable[..., Finished]) -> None:
    sweep("hydra/launcher=ray", f"hydra.launcher.ray.init.address={address}")


def test_two_workers_share_a_conversion(
    address: str, shared: Callable[..., None], tmp_path: Path
) -> None:
    """Each takes a core and a half, of which a node has two: two nodes, a worker on each."""
    second = node(tmp_path, f"--address={address}", "--block", "--num-cpus=2")
    try:
        shared("runtime.engine=ray", f"runtime.cluster={{address: '{address}', num_cpus: 1.5}}")
    finally:
        second.terminate()
        second.wait(60)


def test_two_workers_on_a_cluster_of_their_own(shared: Callable[..., None]) -> None:
    shared("runtime.engine=ray")
