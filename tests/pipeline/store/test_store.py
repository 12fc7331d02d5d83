"""The store: built once, never half, never used when damaged, whatever kills its builders."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.store import manifest
from pipeline.store.step import Step
from pipeline.store.store import Artifact, Store
from stages.errors import InputError

REPOSITORY = Path(__file__).parents[3]
BUILDER = """
import logging, sys, time
from pathlib import Path
from pipeline.store.step import Step
from pipeline.store.store import Store

logging.basicConfig(level=logging.INFO)
root, side, pause = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])

def make(folder):
    (folder / "data.txt").write_text("half")
    with side.open("a") as stream:
        stream.write("built\\n")
    time.sleep(pause)
    (folder / "data.txt").write_text("whole")

built = Store(Path(root)).build(Step("demo", {"x": 1}, {}, ("stages.errors",)), make)
print(built.hit, (built.path / "data.txt").read_text())
"""


def step(x: int = 1, **inputs: str) -> Step:
    return Step("demo", {"x": x}, inputs, ("stages.errors",))


def whole(folder: Path) -> None:
    (folder / "data.txt").write_text("whole")
    (folder / "deep").mkdir()
    (folder / "deep" / "more.bin").write_bytes(bytes(1000))


def never(*arguments: Any) -> None:
    raise AssertionError("must not be called")


def builder(root: Path, side: Path, pause: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", BUILDER, str(root), str(side), str(pause)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True)


def wait_for(file: Path) -> None:
    limit = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < limit, f"{file} never came"
        time.sleep(0.01)


def visible(root: Path) -> list[str]:
    """All files and folders of a store but its locks."""
    paths = [path.relative_to(root).as_posix() for path in root.rglob("*")]
    return sorted(path for path in paths if not path.startswith(".locks"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def built(store: Store) -> Artifact:
    return store.build(step(), whole)


def test_build_then_hit(store: Store) -> None:
    assert store.find(step()) is None
    made = store.build(step(), whole)
    assert not made.hit
    assert made.path == store.root / "demo" / step().key()
    found = store.build(step(), never)
    assert found.hit
    assert found.manifest == made.manifest
    assert found.seconds == made.seconds >= 0
    assert store.open("demo", step().key()) == store.find(step()) == found
    assert store.find(step(2)) is None


def test_manifest_says_what_determined_the_artifact(tmp_path: Path) -> None:
    other = Store(tmp_path, {"device": "cpu"}).build(step(3, text="0" * 32), whole)
    record = json.loads((other.path / "manifest.json").read_text())
    assert record["stage"] == "demo"
    assert record["key"] == step(3, text="0" * 32).key()
    assert (record["spec"], record["inputs"]) == ({"x": 3}, {"text": "0" * 32})
    assert record["runtime"] == {"device": "cpu"}
    assert record["files"]["data.txt"]["bytes"] == 5
    sum_of_thousand_zeros = "541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53"
    assert record["files"]["deep/more.bin"]["sha256"] == sum_of_thousand_zeros
    assert record["versions"]["python"].startswith("3.")
    assert set(record["git"]) == {"revision", "dirty"}
    assert record["machine"]["cpus"] >= 1


def test_open_of_what_is_absent_is_one_clear_line(store: Store) -> None:
    with pytest.raises(InputError, match="no artifact demo/abc"):
        store.open("demo", "abc")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_build_leaves_nothing(store: Store, error: type[BaseException]) -> None:
    def fail(folder: Path) -> None:
        whole(folder)
        raise error

    with pytest.raises(error):
        store.build(step(), fail)
    assert visible(store.root) == ["demo"]
    assert not store.build(step(), whole).hit


def truncate(path: Path) -> None:
    (path / "data.txt").write_text("who")


def alter(path: Path) -> None:
    (path / "data.txt").write_text("whale")


def delete(path: Path) -> None:
    (path / "deep" / "more.bin").unlink()


def add(path: Path) -> None:
    (path / "deep" / "extra.bin").write_bytes(b"1")


def cut_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def forge_manifest(path: Path) -> None:
    record = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**record, "seconds": 1e-9}))


def drop_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    "damage", [truncate, alter, delete, add, cut_manifest, forge_manifest, drop_manifest]
)
def test_damage_is_found_logged_and_repaired(
    store: Store,
    built: Artifact,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = visible(store.root)
    assert store.find(step()) is not None
    damage(built.path)
    assert store.find(step()) is None
    assert "is damaged" in caplog.text
    with pytest.raises(InputError, match="is damaged"):
        store.open("demo", built.key)
    caplog.clear()
    assert not store.build(step(), whole).hit
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert store.build(step(), never).hit
    assert visible(store.root) == before


def test_artifact_in_the_wrong_place_is_not_used(store: Store, built: Artifact) -> None:
    built.path.rename(built.path.with_name(step(2).key()))
    assert store.find(step(2)) is None


def test_large_files_are_read_when_their_time_changed(
    store: Store, built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "LARGE", 4)
    file = built.path / "data.txt"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    os.utime(file, ns=(0, 1_000_000_000))
    assert store.find(step()) is not None, "a copy with another time is whole"
    file.write_text("whale")
    assert store.find(step()) is None
    os.utime(file, ns=times)
    assert store.find(step()) is not None, "same size and time are trusted"
    with pytest.raises(manifest.Damaged, match=r"data\.txt has been altered"):
        store.load("demo", built.key, full=True)


def test_verified_files_are_not_read_again(
    store: Store, built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.find(step()) is not None
    monkeypatch.setattr(hashlib, "file_digest", never)
    assert store.find(step()) is not None
    with pytest.raises(AssertionError):
        store.load("demo", built.key, full=True)


def test_killed_builder_leaves_nothing_that_is_used(store: Store, tmp_path: Path) -> None:
    side = tmp_path / "side"
    victim = builder(store.root, side, pause=60)
    wait_for(side)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert any(".tmp-" in name for name in visible(store.root)), "killed in mid-build"
    assert store.find(step()) is None
    again = builder(store.root, side, pause=0)
    assert again.communicate()[0] == "False whole\n"
    assert not any(".tmp-" in name for name in visible(store.root))
    assert side.read_text() == "built\n" * 2


def test_two_processes_build_once_and_the_second_waits(store: Store, tmp_path: Path) -> None:
    side = tmp_path / "side"
    first = builder(store.root, side, pause=2)
    wait_for(side)
    second = builder(store.root, side, pause=0)
    out, log = second.communicate(timeout=60)
    assert first.communicate(timeout=60)[0] == "False whole\n"
    assert out == "True whole\n"
    assert log.count("waiting") == 1
    assert side.read_text() == "built\n"


def test_simultaneous_start_builds_once(store: Store, tmp_path: Path) -> None:
    side = tmp_path / "side"
    together = [builder(store.root, side, pause=0.2) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0] for process in together]
    assert sorted(outputs) == ["False whole\n"] + ["True whole\n"] * 3
    assert side.read_text() == "built\n"


def test_importing_the_store_is_light() -> None:
    code = "import sys, pipeline.commands.upkeep; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "filelock" in loaded
    assert not {"torch", "numpy", "pandas", "hydra", "mlflow"} & loaded
