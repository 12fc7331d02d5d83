"""Servers that integration tests start on this machine, in a temporary folder each, and stop again."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

KEYS = {"machine": "very-secret", "reader": "reader-secret"}  # of the users of an S3 server
ACTIONS = {"machine": ["Admin"], "reader": ["Read:shared", "List:shared"]}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(command: Sequence[str], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that has begun to listen on a port; fails with a line where its program is not there."""
    if shutil.which(command[0]) is None:
        pytest.fail(f"{command[0]} is not installed; the first lines of this file say how")
    with log.open("w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        yield server
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def seaweedfs(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The endpoint of SeaweedFS, in which buckets are not made by writing to them, and its process."""
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": name, "secretKey": secret}],
            "actions": ACTIONS[name],
        }
        for name, secret in KEYS.items()
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    options = {"dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "volume.max": 20}
    options |= {f"{part}.port": free_port() for part in ("master", "volume", "filer", "s3")}
    options |= {f"{part}.port.grpc": free_port() for part in ("master", "volume", "filer", "s3")}
    options |= {"s3.port.iceberg": 0, "s3.port.lance": 0}
    options |= {"s3.config": folder / "s3.json", "s3.autoCreateBucket": False}
    options |= {
        "master.telemetry": False,
        "master.volumeSizeLimitMB": 64,
        "volume.preStopSeconds": 1,
    }
    values = {n: str(v).lower() if v is False else v for n, v in options.items()}
    arguments = [f"-{name}={value}" for name, value in values.items()]
    port = options["s3.port"]
    with running(["weed", "server", "-s3", *arguments], port, folder / "weed.log") as server:
        yield f"http://127.0.0.1:{port}", server


@contextmanager
def rclone(folder: Path) -> Iterator[str]:
    """The endpoint of `rclone serve s3`, which overwrites where it is asked only to create."""
    port = free_port()
    command = ["rclone", "serve", "s3", "--addr", f"127.0.0.1:{port}", str(folder)]
    with running(command, port, folder.with_suffix(".log")):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """The address of a Redis server without a file of its own."""
    port = free_port()
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": ""}
    command = ["redis-server", *(f for n, v in options.items() for f in (f"--{n}", str(v)))]
    with running(command, port, folder / "redis.log"):
        yield f"redis://127.0.0.1:{port}/0"


def credentials(endpoint: str, user: str = "machine") -> Mapping[str, str]:
    """What botocore reads from the environment."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": user,
        "AWS_SECRET_ACCESS_KEY": KEYS[user],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
