"""The verbs of `python -m pipeline store`, run as a user runs them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.store import manifest, processes, uses
from pipeline.store.step import Step
from pipeline.store.store import SHARES, Artifact, Store
from tests.pipeline.conftest import REPOSITORY, Finished, Tiny, main_in


def step(x: int = 1, **inputs: str) -> Step:
    return Step("demo", {"x": x}, inputs, ("stages.errors",))


def whole(folder: Path) -> None:
    (folder / "data.txt").write_text("whole")
    (folder / "more.bin").write_bytes(bytes(1000))


def cli(root: Path, *arguments: str) -> Finished:
    return main_in(REPOSITORY, ["store", *arguments, "--store", str(root)])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def built(store: Store) -> Artifact:
    return store.build(step(), whole)


def test_ls_and_show(store: Store, built: Artifact) -> None:
    listing = cli(store.root, "ls")
    assert listing.code == 0
    stage, key, size, age, seconds = listing.out.splitlines()[1].split()
    assert (stage, key, size) == ("demo", built.key, "0.001")
    assert age.startswith("0:00:")
    assert float(seconds) == pytest.approx(built.seconds, abs=0.01)
    shown = cli(store.root, "show", built.key[:8])
    assert json.loads(shown.out) == built.manifest


def test_a_reader_that_has_seen_enough_ends_it_in_silence(store: Store) -> None:
    for x in range(400):  # more than a pipe holds
        folder = store.root / "demo" / f"{x:032x}"
        folder.mkdir(parents=True)
    command = [sys.executable, "-m", "pipeline", "store", "ls", "--store", str(store.root)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        told = process.stderr.read()
    assert (process.returncode, told) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "zz"], "0 artifacts"),
        (["gc", "--keep-file", "absent"], "cannot read absent"),
    ],
)
def test_bad_arguments_are_one_line(
    store: Store, built: Artifact, arguments: list[str], message: str
) -> None:
    done = cli(store.root, *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_absent_store_is_one_line(tmp_path: Path) -> None:
    done = cli(tmp_path / "absent", "ls")
    assert (done.code, done.err.count("\n")) == (2, 1)


def test_verify_fails_on_damage(store: Store, built: Artifact) -> None:
    assert cli(store.root, "verify").code == 0
    (built.path / "data.txt").write_text("whale")
    done = cli(store.root, "verify")
    assert done.code == 1
    assert f"demo/{built.key}: data.txt has been altered" in done.out


@pytest.fixture
def chain(store: Store) -> dict[str, str]:
    """Keys of: a base, what is made from it, what is made from that, and a stranger."""
    base = store.build(step(1), whole).key
    middle = store.build(step(2, base=base), whole).key
    top = store.build(step(3, middle=middle), whole).key
    return {"base": base, "middle": middle, "top": top, "other": store.build(step(4), whole).key}


def left(store: Store) -> set[str]:
    return {path.name for path in store.folders()}


def redate(store: Store, key: str, created: str) -> None:
    path = store.root / "demo" / key
    manifest.write(path, {**manifest.read(path), "created": created})


def test_gc_keeps_named_keys_with_their_inputs(
    store: Store, chain: dict[str, str], tmp_path: Path
) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text(f"# paper\n\n{chain['middle']}  # table 1\n")
    preview = cli(store.root, "gc", "--keep-file", str(keep))
    assert chain["top"] in preview.out
    assert chain["base"] not in preview.out
    assert left(store) == {*chain.values()}, "a preview deletes nothing"
    assert cli(store.root, "gc", "--keep-file", str(keep), "--yes").code == 0
    assert left(store) == {chain["base"], chain["middle"]}


def test_gc_by_age_keeps_what_younger_ones_need(store: Store, chain: dict[str, str]) -> None:
    for name in ("base", "top", "other"):
        redate(store, chain[name], "2020-01-01T00:00:00+00:00")
    cli(store.root, "gc", "--older-than", "30", "--yes")
    assert left(store) == {chain["base"], chain["middle"]}
    cli(store.root, "gc", "--older-than", "0", "--yes")
    assert left(store) == set()


@pytest.mark.parametrize("text", ["", "nonsense\n", "0" * 32])
def test_gc_refuses_a_keep_file_that_keeps_nothing(
    store: Store, chain: dict[str, str], tmp_path: Path, text: str
) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text(text)
    assert cli(store.root, "gc", "--keep-file", str(keep), "--yes").code == 2
    assert left(store) == {*chain.values()}


def test_gc_removes_leftovers_of_the_dead_only(store: Store) -> None:
    dead = store.root / "demo" / f".tmp-{'0' * 32}-1"
    dead.mkdir(parents=True)

    def collect(folder: Path) -> None:
        preview = cli(store.root, "gc").out
        assert dead.name in preview
        assert folder.name not in preview, "its builder is alive"
        assert dead.exists()
        assert cli(store.root, "gc", "--yes").code == 0
        assert not dead.exists()
        whole(folder)

    assert not store.build(step(), collect).hit
    assert store.find(step()) is not None


def test_gc_keeps_what_a_run_is_at_work_with(store: Store, chain: dict[str, str]) -> None:
    coming = step(5, other=chain["other"]).key()
    unit = store.build(Step(SHARES, {"stage": "demo", "key": coming, "unit": 0}, {}, ()), whole)
    dead = store.root / uses.FOLDER / f"{socket.gethostname()}-{1 << 30}-abcdef"
    with store.using([chain["middle"], coming]):
        dead.write_text(chain["top"])
        cli(store.root, "gc", "--older-than", "0", "--yes")
        assert left(store) == {chain["base"], chain["middle"], unit.key}
        assert not dead.exists()
    cli(store.root, "gc", "--older-than", "0", "--yes")
    assert left(store) == set() and not [*dead.parent.iterdir()]


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["began it", "is younger"])
def test_the_number_of_a_dead_process_may_be_another_s(store: Store, seconds: float) -> None:
    leftover = store.root / "demo" / f".tmp-{'0' * 32}-{processes.file_name()}"
    leftover.mkdir(parents=True)
    os.utime(leftover, times=2 * (leftover.stat().st_mtime - seconds,))
    assert (leftover in store.orphans()) == bool(seconds)


def test_gc_keeps_what_an_experiment_reaches(tiny_run: Tiny, command, tmp_path: Path) -> None:
    done = command(tmp_path, "-m", "experiment=none", "coding=las,gated")
    kept = set(done.results[1]["keys"].values())
    lost = set(done.results[0]["keys"].values()) - kept
    root = tmp_path / "outputs/store"
    keep = ["--keep", "none", "coding=gated", *tiny_run.overrides]
    preview = cli(root, "gc", *keep)
    assert preview.code == 0, preview.err
    assert f"{len(lost)} folders; --yes deletes them" in preview.out
    assert cli(root, "gc", *keep, "--yes").code == 0
    found = {path.name for path in Store(root).folders()}
    assert kept <= found and not lost & found
    assert {path.parent.name for path in Store(root).folders()} >= {"tokens", "capture"}
    absent = cli(root, "gc", "--keep", "none coding=las timesteps=9", "--yes")
    assert absent.code == 2 and "--keep 'none coding=las timesteps=9' names" in absent.err
    unknown = cli(root, "gc", "--keep", "nonsense", "--yes")
    assert (unknown.code, unknown.err.count("\n")) == (2, 1)
    assert "nonsense" in unknown.err and {p.name for p in Store(root).folders()} == found


def test_gc_takes_the_shares_of_what_is_there_and_keeps_those_of_what_is_kept(
    store: Store, built: Artifact, tmp_path: Path
) -> None:
    whole_ones = {"stage": "demo", "key": built.key}
    missing = {"stage": "demo", "key": step(2).key()}
    done, left = (
        store.build(Step(SHARES, {**of, "unit": 0}, {}, ()), whole) for of in (whole_ones, missing)
    )
    assert str(done.key) in cli(store.root, "gc", "--yes").out
    assert not done.path.exists() and left.path.exists() and built.path.exists()
    keep = tmp_path / "keep"
    keep.write_text(f"{built.key}\n{missing['key']}\n")
    cli(store.root, "gc", "--keep-file", str(keep), "--yes")
    assert left.path.exists()
    keep.write_text(f"{built.key}\n")
    cli(store.root, "gc", "--keep-file", str(keep), "--yes")
    assert not left.path.exists() and built.path.exists()
