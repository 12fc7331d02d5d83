"""Verbs, locks and refusals of stores that machines share."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.store import locks, shared
from pipeline.store.objects import Away, Objects
from pipeline.store.shared import SharedStore
from pipeline.store.spec import StoreSpec
from stages.errors import InputError
from tests.pipeline.conftest import REPOSITORY, Finished, main_in
from tests.pipeline.store.machines import Machine, alter, builder, content, files, step, writing
from tests.pipeline.store.test_store import never, wait_for


def cli(store: SharedStore, *arguments: str) -> Finished:
    options = ["--store", store.name, "--cache", str(store.root)]
    return main_in(REPOSITORY, ["store", *arguments, *options])


def test_the_verbs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = machine("one"), machine("other")
    keys = [one.build(step(x), writing("whole")).key for x in (1, 2)]
    alone = machine("alone").build(step(3), writing("whole")).key
    listing = cli(other, "ls")
    assert listing.code == 0 and [
        line.split()[1] for line in listing.out.splitlines()[1:]
    ] == sorted([*keys, alone])
    assert json.loads(cli(other, "show", keys[0]).out)["key"] == keys[0]
    assert cli(other, "verify").out.endswith("3 artifacts, 0 damaged\n")
    (name,) = (n for n in files(one) if keys[1] in n and n.endswith("data.txt"))
    alter(one.remote.objects, f".files/{name}")
    damaged = cli(other, "verify")
    assert (
        damaged.code == 1 and f"damaged  demo/{keys[1]}: data.txt has been altered" in damaged.out
    )
    assert cli(other, "push").out == f"0 artifacts that were in {other.root} alone\n"
    one.remote.objects.put(
        {f".files/demo/{'0' * 32}/{'1' * 16}/data": one.root / "demo" / keys[0] / "data.txt"}
    )
    assert "0 folders" in cli(other, "gc").out, "it may be an upload that goes on"
    monkeypatch.setattr(shared, "PATIENCE", -1)
    left = cli(other, "gc", "--yes")
    assert "1 folders" in left.out and "0" * 32 in left.out
    assert len(files(one)) == 6
    assert cli(other, "gc", "--older-than", "0", "--yes").code == 0
    assert one.remote.keys() == set() and files(one) == []
    assert [path.name for path in one.folders()] == sorted(keys), "those of another cache stay"


def test_gc_of_a_machine_keeps_what_another_works_with(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    kept, lost = (one.build(step(x), writing("whole")).key for x in (1, 2))
    with one.using([kept]):
        assert cli(other, "gc", "--older-than", "0", "--yes").code == 0
        assert one.remote.keys() == {("demo", kept)}
    cli(other, "gc", "--older-than", "0", "--yes")
    assert one.remote.keys() == set()


def test_an_address_without_a_store_is_one_line(machine: Machine) -> None:
    done = cli(machine("one"), "ls")
    assert done.code == 2 and done.err.startswith("error: no store at ")
    assert done.err.count("\n") == 1
    assert cli(machine("one"), "push").code == 0, "it may begin with what a cache holds"


def test_gc_deletes_nothing_when_half_is_seen(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = machine("one")
    one.build(step(), writing("whole"))

    def away(self: Objects, paths: Any) -> Any:
        raise Away("nobody there")

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "read_all", away)
        done = cli(machine("other"), "gc", "--older-than", "0", "--yes")
    assert done.code == 2 and done.err == "error: nobody there\n"
    assert content(machine("third").find(step())) == "whole"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "nonsense://x"}, "fsspec knows no nonsense://"),
        ({"path": "ftp://me:secret@host/x"}, "store.path has a password in it"),
        ({"path": "x", "lock": "redis://:secret@host"}, "store.lock has a password in it"),
        ({"path": "x", "lock": "redis"}, "choose auto, file, lease, none or redis://"),
        ({"path": "memory://x", "lock": "file"}, "store.lock=file with store.path=memory://x"),
    ],
)
def test_what_cannot_be_is_one_line(given: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        StoreSpec(**given).open()
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(protocol: str) -> None:
        raise ImportError("no s3fs")

    monkeypatch.setattr("fsspec.get_filesystem_class", absent)
    with pytest.raises(InputError, match=r"pip install -c constraints.txt -e \.\[s3\]"):
        StoreSpec("s3://bucket/x").open()


@pytest.mark.parametrize("kind", ["address", "leases in a folder"])
def test_processes_build_once_and_outlive_a_killed_one(tmp_path: Path, kind: str) -> None:
    """Two caches on one machine stand for two machines."""
    side = tmp_path / "side"
    remote = kind == "address"
    where = (f"file://{tmp_path}/remote", "auto") if remote else (f"{tmp_path}/store", "lease")

    def start(name: str, pause: float) -> Any:
        return builder(where[0], tmp_path / name, where[1], side, pause)

    victim = start("victim", 60)
    wait_for(side)
    first, second = start("first", 0.5), start("second", 0.5)
    time.sleep(0.5)
    assert side.read_text() == "built\n", "both wait"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert sorted(outputs) == ["False whole\n", "True whole\n"]
    assert side.read_text() == "built\n" * 2


def test_a_folder_without_locks_keeps_one_whole_artifact(tmp_path: Path) -> None:
    first, second = (StoreSpec(str(tmp_path), lock="none").open() for _ in range(2))

    def make(folder: Path) -> None:
        writing("first")(folder)
        assert content(second.build(step(), writing("second"))) == "second"

    assert content(first.build(step(), make)) == "second"
    assert not list(tmp_path.glob("*/.tmp-*"))
    leased = StoreSpec(str(tmp_path), lock="lease").open()
    leased.build(step(3), lambda out: StoreSpec(str(tmp_path)).open().orphans() and never())
    half = tmp_path / "demo" / f".tmp-{step(2).key()}-other-1-abcdef"
    half.mkdir()
    assert first.orphans() == [], "somebody may be at work in it"
    first.build(step(2), writing("whole"))
    assert half.exists()
    os.utime(half, (0, 0))
    assert first.orphans() == [half] and first.remove(half) and not half.exists()


def test_a_lock_service_that_is_gone_is_gone_without(caplog: pytest.LogCaptureFixture) -> None:
    def absent() -> Any:
        raise ConnectionError("refused")

    lock = locks.IfThere(absent)
    assert lock.acquire(wait=True)
    lock.release()
    assert "no lock (refused): another machine may build the same artifact" in caplog.text
