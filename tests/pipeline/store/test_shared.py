"""A store that machines share: built once, never half, never of two builders, whatever is cut off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.store import manifest
from pipeline.store.objects import Away, Objects
from pipeline.store.remote import Remote
from stages.errors import InputError
from tests.pipeline.store.machines import Machine, alter, content, cut, drop, files, step, writing
from tests.pipeline.store.test_store import never


def test_what_one_machine_builds_another_reads(machine: Machine) -> None:
    one, other = machine("one"), machine("other")
    assert other.find(step()) is None and not other.holds("demo", step().key())
    made = one.build(step(), writing("whole"))
    assert not made.hit and one.build(step(), never).hit
    taken = machine("third").build(step(), never)
    assert taken.hit and content(taken) == "whole"
    assert taken.manifest == made.manifest and taken.manifest["runtime"] == {"machine": "one"}
    assert content(other.find(step())) == "whole"
    assert other.open("demo", step().key()).path == other.root / "demo" / step().key()
    times = [(a.path / "data.txt").stat().st_mtime_ns for a in (made, taken)]
    assert times[0] == times[1], "quick checks of large files compare it"
    assert not list(other.root.glob("**/.tmp-*"))
    assert machine("fourth").holds("demo", step().key())


def test_downloads_stay_on_each_machine(machine: Machine) -> None:
    machine("one").build(step(stage="asset"), writing("whole"))
    assert machine("other").find(step(stage="asset")) is None


def test_an_upload_that_is_cut_is_not_there_and_is_made_up_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, put = machine("one"), Objects.put

    def cut(self: Objects, files: dict[str, Path]) -> None:
        first = dict([next(iter(files.items()))])
        put(self, first)
        raise Away("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", cut)
        assert content(one.build(step(), writing("whole"))) == "whole"
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "push" in caplog.text
    assert files(one), "half of it is there"
    assert machine("other").find(step()) is None
    assert one.build(step(), never).hit, "and the remote is left alone for a while"
    assert machine("other").find(step()) is None
    machine("one").build(step(), never)  # the next run
    assert content(machine("other").find(step())) == "whole"
    assert len(files(one)) == 2


def test_push(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "upload", lambda *_: (_ for _ in ()).throw(Away("gone")))
        for x in (1, 2):
            machine("one").build(step(x), writing("whole"))
    assert {p.name for p in machine("one").push()} == {step(1).key(), step(2).key()}
    assert machine("one").push() == []
    assert content(machine("other").find(step(2))) == "whole"


@pytest.mark.parametrize("moment", ["make", "put", "create", "rename"])
def test_two_builders_without_a_lock(
    machine: Machine, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other builds while the first is at some step; what they make differs in its bytes."""
    first, second = machine("first"), machine("second")
    done: list[str] = []

    def meanwhile() -> None:
        if not done:
            done.append("")
            done[0] = content(second.build(step(), writing("by the second")))

    def make(folder: Path) -> None:
        writing("by the first")(folder)
        if moment == "make":
            meanwhile()

    if moment != "make":
        given = getattr(Objects, moment)

        def stepping(self: Objects, *arguments: Any) -> Any:
            if self is first.remote.objects and ".trials" not in str(arguments[0]):
                meanwhile()
            return given(self, *arguments)

        monkeypatch.setattr(Objects, moment, stepping)
    mine = content(first.build(step(), make))
    theirs = [content(machine(name).find(step())) for name in ("third", "fourth")]
    assert theirs[0] == theirs[1] and theirs[0] in ("by the first", "by the second")
    assert mine == theirs[0], "the one who comes last takes what stands"
    assert machine("third").build(step(), never).hit
    machine("third").verify(machine("third").folder("demo", step().key()))


@pytest.mark.parametrize("what", ["data.txt", "deep/more.bin", "manifest"])
@pytest.mark.parametrize("damage", [alter, cut, drop])
def test_damage_in_the_remote_is_found_and_built_again(
    machine: Machine,
    damage: Callable[[Objects, str], None],
    what: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, key = machine("one"), step().key()
    one.build(step(), writing("whole"))
    if what == "manifest":
        damage(one.remote.objects, f"demo/{key}.json")
    else:
        (name,) = (name for name in files(one) if name.endswith(what))
        damage(one.remote.objects, f".files/{name}")
    other = machine("other")
    gone = what == "manifest" and damage is drop
    assert other.find(step()) is None
    assert ("is damaged" in caplog.text) == (not gone)
    assert not list(other.root.glob("**/data.txt")), "nothing half of it is in the cache"
    assert not other.build(step(), writing("again")).hit
    assert content(machine("third").find(step())) == "again"


def test_a_damaged_copy_is_taken_again(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    one = machine("one")
    made = one.build(step(), writing("whole"))
    (made.path / "data.txt").write_text("whale")
    assert content(one.build(step(), never)) == "whole"
    assert "replaced by" in caplog.text


def test_a_manifest_cannot_name_files_elsewhere(machine: Machine, tmp_path: Path) -> None:
    one = machine("one")
    made = one.build(step(), writing("whole"))
    record = json.loads((made.path / manifest.NAME).read_text())
    record.pop("checksum")
    record["files"]["../../../escaped"] = record["files"].pop("data.txt")
    manifest.write(tmp_path, record)
    one.remote.objects.write(f"demo/{made.key}.json", (tmp_path / manifest.NAME).read_bytes())
    assert machine("other").find(step()) is None
    assert not list(tmp_path.rglob("escaped"))


def test_deleted_while_it_is_read_is_not_there(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machine("one"), machine("other")
    one.build(step(), writing("whole"))
    get = Objects.get

    def late(self: Objects, files: dict[str, Path]) -> None:
        one.remote.remove(("demo", step().key()))
        get(self, files)

    monkeypatch.setattr(Objects, "get", late)
    assert other.find(step()) is None


def test_a_remote_that_does_not_answer_costs_one_warning(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def away(self: Objects, *arguments: Any) -> Any:
        asked.append(arguments)
        raise Away("nobody there")

    for name in ("read", "write", "create", "put", "names"):
        monkeypatch.setattr(Objects, name, away)
    store = machine("one", lock="auto")
    with pytest.raises(InputError, match="nobody there. Nothing has begun"):
        store.check()
    for x in range(3):
        assert content(store.build(step(x), writing("whole"))) == "whole"
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len([line for line in warned if "Going on with" in line]) == 1
    assert len(asked) < 6


def test_two_machines_build_once(machine: Machine) -> None:
    """The second looks again once it has the lock, which the first had while it built."""
    one, other = machine("one", lock="auto"), machine("other", lock="auto")

    def make(folder: Path) -> None:
        lock = other._lock("demo", step().key())
        assert not lock.acquire(wait=False)
        writing("whole")(folder)

    one.build(step(), make)
    lock = other._lock("demo", step().key())
    assert lock.acquire(wait=False)
    lock.release()
    assert other.build(step(), never).hit
