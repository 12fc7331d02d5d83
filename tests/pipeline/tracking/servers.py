"""A real `mlflow server` of tests, and a sweep that is logged to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.pipeline.conftest import Finished

PATIENCE = 120  # seconds for the server to start
SWEEP = ("-m", "experiment=null", "coding=las,gated", "coding.timesteps=6")
EXPERIMENT = "over-http"
AXES = {"coding", "grains", "timesteps", "transform", "model", "corpus", "seed", "row", "sites"}


class Server:
    """`mlflow server` on a free port, with its database and artifacts in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.client = MlflowClient(tracking_uri=self.uri)

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + PATIENCE
        while not self._healthy():
            assert self.process.poll() is None and time.monotonic() < end, log.name
            time.sleep(0.1)

    def _healthy(self) -> bool:
        try:
            with urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def runs(self, sweep: Path) -> tuple[Run, dict[str, Run]]:
        """The only parent run of a sweep, and its children by job."""
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        found = self.client.search_runs([experiment.experiment_id], f"tags.sweep = '{sweep.name}'")
        (parent,) = (run for run in found if run.data.tags["kind"] == "sweep")
        jobs = [run for run in found if "job" in run.data.tags]
        assert all(r.data.tags["mlflow.parentRunId"] == parent.info.run_id for r in jobs)
        children = {run.data.tags["job"]: run for run in jobs}
        assert len(children) == len(jobs)
        return parent, children


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder and store for all sweeps."""
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module", autouse=True)
def busy_machine() -> Iterator[None]:
    """Machines that run tests may be slow; what a slow server costs is another test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        yield


def to(uri: str) -> list[str]:
    where = [f"tracking.uri={uri}", f"tracking.experiment={EXPERIMENT}"]
    return ["tracking.enabled=true", *where, "tracking.patience=300"]


@pytest.fixture(scope="module")
def sweep(command, server: Server, folder: Path) -> Finished:
    return command(folder, *SWEEP, *to(server.uri), "runtime.figures=true")
