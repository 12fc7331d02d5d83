"""Units of a stage in the store: any process may build any of them, in any order, to the same artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.run import models, peers, runner
from pipeline.run.shares import Cut, Shared
from pipeline.run.stages import Captured
from pipeline.store.store import SHARES, Store

WINDOWS = (
    *("calibration.windows=5", "runtime.batch=2", "evaluation.windows=3", "patching.windows=1"),
    *("evaluation.tasks=[piqa]", "evaluation.replicates=2", "evaluation.anytime=true"),
    "timesteps=3",
)
MEASURED = (*WINDOWS, "coding=gated_budget", "coding.centre=channel")  # of three statistics


def contents(store: Path) -> dict[str, Mapping[str, str]]:
    """The hash of every file of every artifact, by stage and key."""
    return {
        f"{path.parent.name}/{path.name}": {
            name: entry["sha256"]
            for name, entry in Store(store)
            .open(path.parent.name, path.name)
            .manifest["files"]
            .items()
        }
        for path in Store(store).folders()
    }


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> Path:
    """The store of a run in one process."""
    store = tmp_path_factory.mktemp("alone")
    runner.execute(settings(store, *MEASURED))
    return store


def started(
    settings, store: Path | str, *overrides: str, measured: Sequence[str] = MEASURED
) -> runner.Run:
    run = runner.start(settings(store, *measured, *overrides))
    runner.checks.complete(run.chain, run.store, run.runtime)
    return run


def test_units_merge_into_the_artifacts_of_one_process(settings, alone, tmp_path):
    run = started(settings, tmp_path)
    cut = 0
    for stage in run.chain.steps.values():
        if not isinstance(stage, Cut):
            run.build(stage)
            continue
        shared, cut = Shared(stage, run.store, run.runtime), cut + 1
        assert shared.merge() is None
        for turn in range(shared.number):  # two workers in turn, one unit at a time
            assert shared.work(start=(turn % 2) / 2, most=1)
            assert len(shared.there) == turn + 1
        assert not shared.work(start=0.0)
        artifact = shared.merge()
        assert artifact is not None and not artifact.hit
        assert not shared.there and not shared.work(start=0.5)
    # capture, patching; two replicates of ours and dense, anytime; means, what is about them, curvature
    assert cut == 2 + 4 + 4 + 1 + 3
    assert not list((tmp_path / SHARES).iterdir())
    assert not list((tmp_path / ".locks").glob(f"{SHARES}-*"))
    assert contents(tmp_path) == contents(alone)


def test_a_worker_goes_on_from_what_another_has_left(settings, alone, tmp_path):
    run = started(settings, tmp_path)
    assert run.chain.capture is not None
    shared = Shared(run.chain.capture, run.store, run.runtime)
    shared.work(start=0.0, most=2)
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / SHARES).iterdir()}
    damaged = sorted(left)[0]
    (damaged / "part.safetensors").write_bytes(b"")
    built = []
    make = Store._make

    def noted(store, step, *arguments, **options):
        built.append(
            step.spec["unit"] if step.stage == SHARES and step.spec["stage"] == "capture" else None
        )
        return make(store, step, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "_make", noted)
        peers.work(
            [*run.chain.steps.values()], run.store, run.runtime, (0, 1), False, lambda *_: None
        )
    again = [unit for unit in built if unit is not None]
    assert len(again) == shared.number - 2 + 1 and len({*again}) == len(again)
    assert contents(tmp_path) == contents(alone)


@pytest.fixture
def machines(settings, tmp_path) -> tuple[Shared, Shared]:
    """The units of one capture at two machines, each with its cache in front of the same address."""

    def machine(name: str) -> Shared:
        run = started(settings, f"file://{tmp_path}/remote", f"store.cache={tmp_path}/{name}")
        assert run.chain.capture is not None and run.runtime is not None
        return Shared(run.chain.capture, run.store, run.runtime)

    return machine("one"), machine("other")


def finish(shared: Shared) -> None:
    """What a worker does for one stage."""
    peers.work([shared.stage], shared.store, shared.runtime, (0, 1), False, lambda *_: None)


def test_units_that_a_machine_has_only_looked_at_go_too(machines, tmp_path, monkeypatch):
    one, other = machines
    assert not other.there  # of which it asks again in seconds
    one.work(start=0.0)
    merge, brought = Shared.merge, []

    def late(shared: Shared):
        if shared.store is other.store:
            brought.extend((tmp_path / "other" / SHARES).iterdir())
            merge(one)
        return merge(shared)

    monkeypatch.setattr(Shared, "merge", late)
    finish(other)
    assert len(brought) == one.number
    for place in ("one", "other", "remote", "remote/.files"):
        assert not [*(tmp_path / place / SHARES).iterdir()], place
    assert not [*tmp_path.glob(f"*/.locks/{SHARES}-*"), *tmp_path.glob("remote/.leases/*")]


def test_an_address_that_is_lost_before_units_merge_is_a_warning(machines, tmp_path, caplog):
    one, _ = machines
    one.work(start=0.0)
    (tmp_path / "remote").rename(tmp_path / "gone")
    (tmp_path / "remote").write_text("no folder")
    finish(one)
    assert one.store.holds(one.stage.name, one.stage.key())
    assert not [*(tmp_path / "one" / SHARES).iterdir()]
    assert "Going on with" in caplog.text


def test_units_of_another_way_to_run_are_not_mixed(settings, tmp_path):
    run = started(settings, tmp_path)
    capture, runtime = run.chain.capture, run.runtime
    assert capture is not None and runtime is not None
    shared = Shared(capture, run.store, runtime)
    shared.work(start=0.0, most=1)
    others = {"batch": 1, "device": "cuda:1", "compile": True}
    for name, value in others.items():
        assert not Shared(capture, run.store, replace(runtime, **{name: value})).there, name
    assert Shared(capture, run.store, replace(runtime, command="another")).there
    assert Shared(capture, run.store, replace(runtime, device="cpu:0")).there


def test_layers_on_disk_are_read_once_for_several_units(settings, tmp_path):
    disk = ("runtime=offload", "runtime.batch=1", "evaluation.tasks=[]", "evaluation.anytime=false")
    disk = (*WINDOWS, *disk, "coding=gated", "coding.centre=channel")
    models.forget()
    runner.execute(settings(tmp_path / "alone", *disk))
    run = started(settings, tmp_path / "shared", measured=disk)
    passes = []
    share = Captured.share

    def noted(claims, *arguments):
        claims = list(claims)
        passes.append([claimed.number for claimed in claims])
        share(claims, *arguments)

    every = [*run.chain.steps.values()]
    assert all(
        stage.key() for stage in every
    )  # which have the code of `share`, before it is patched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Captured, "share", staticmethod(noted))
        assert run.chain.capture is not None and run.runtime is not None
        peers.work(every, run.store, run.runtime, (1, 2), True, lambda *_: None)
    models.forget()
    assert passes == [[2, 3, 4], [0, 1]]  # the second worker of two, and what the first has left
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
