"""Jobs on devices of their own; devices in no key; devices that are not there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pipeline.run.devices import placed, resolve
from pipeline.run.settings import Settings
from stages.errors import InputError
from tests.pipeline.conftest import Finished

Make = Callable[..., Settings]
PAIR = "runtime.devices=[cpu:0,cpu:1]"  # PyTorch knows one processor by many numbers
SINGLE = ("experiment=null", "coding=las")


def held(given: Settings, seconds: float) -> tuple[str, float, float]:
    """A job's device, and from when to when it had it."""
    with placed(given) as settings:
        start = time.monotonic()
        time.sleep(seconds)
        return settings.runtime.device, start, time.monotonic()


def at_once(given: Settings, jobs: int) -> dict[str, list[tuple[float, float]]]:
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda _: held(given, 0.3), range(jobs)))
    return {
        device: sorted((start, end) for name, start, end in done if name == device)
        for device in {name for name, *_ in done}
    }


def overlaps(times: list[tuple[float, float]]) -> bool:
    return any(start < end for (_, end), (start, _) in pairwise(sorted(times)))


def test_three_jobs_at_once_on_two_devices_are_never_two_on_one(settings, tmp_path):
    times = at_once(settings(tmp_path, PAIR), jobs=3)
    assert sorted(len(spans) for spans in times.values()) == [1, 2]
    assert set(times) == {"cpu:0", "cpu:1"}
    assert not any(overlaps(spans) for spans in times.values())
    assert overlaps([spans[0] for spans in times.values()])  # the two devices at the same time


def test_without_the_lock_they_would_be(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("filelock.FileLock.acquire", lambda lock, timeout: None)
    times = at_once(settings(tmp_path, PAIR), jobs=3)
    assert set(times) == {"cpu:0"} and overlaps(times["cpu:0"])


def test_stores_have_devices_of_their_own_and_an_error_frees_one(settings, tmp_path):
    one = "runtime.devices=[cpu:1]"
    first, second = settings(tmp_path / "a", one), settings(tmp_path / "b", one)
    with pytest.raises(ValueError), placed(first), placed(second):
        raise ValueError
    with placed(first) as again:
        assert again.runtime.device == "cpu:1" and again.runtime.devices == ["cpu:1"]


def test_a_job_without_a_list_shares_its_device(settings, tmp_path):
    given = settings(tmp_path, "runtime.device=cpu")
    with placed(given) as first, placed(given) as second:
        assert first is given and second is given


def test_the_device_is_recorded_and_in_no_key(
    command: Callable[..., Finished], settings: Make, tmp_path: Path
):
    pinned = command(tmp_path, *SINGLE, PAIR)
    (result,) = pinned.results
    assert pinned.code == 0 and result["run"]["device"] == "cpu:0"
    records = [json.loads(p.read_text()) for p in tmp_path.glob("outputs/store/*/*/manifest.json")]
    assert len(records) == len(result["keys"]) + 2  # two texts
    for record in records:
        assert record["runtime"]["device"] == "cpu:0"
        assert record["runtime"]["devices"] == ["cpu:0", "cpu:1"]
    with placed(settings(tmp_path / "outputs/store", PAIR)):  # the first is taken
        (again,) = command(tmp_path, *SINGLE, PAIR).results
    assert again["run"]["device"] == "cpu:1"
    (free,) = command(tmp_path, *SINGLE).results
    for other in (again, free):
        assert other["keys"] == result["keys"] and all(other["hits"].values())


REFUSED = {
    "runtime.device=gpu:0": "no gpu:0 here; choose among cpu",
    "runtime.device=cuda:99": "no cuda:99 here; choose among cpu",
    "runtime.devices=[cpu:0,cuda:99]": "no cuda:99 here; choose among cpu",
    "runtime.devices=[]": "list of different devices",
    "runtime.devices=[cpu:0,cpu:0]": "list of different devices",
    "runtime.devices=cpu:0": "give a list or null, runtime.devices=[cpu:0]",
    "runtime.devices=[0,1]": "give a list of names or null",
    "runtime.devices=[cuda,cpu:0]": "list of different devices",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_device_that_is_not_there_is_one_line(override, command, tmp_path):
    done = command(tmp_path, *SINGLE, override)
    (line,) = done.err.splitlines()
    assert done.code == 1 and line.startswith("failed: ") and REFUSED[override] in line
    assert "Traceback" not in done.out


@pytest.mark.parametrize("other", ["runtime.device=cpu", "model.device_map=auto"])
def test_two_ways_to_place_a_model_are_one_too_many(other, command, tmp_path):
    done = command(tmp_path, *SINGLE, PAIR, other)
    (line,) = done.err.splitlines()
    assert done.code == 1 and "runtime.devices" in line and other.split("=")[0] in line


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve("auto") == expected


def test_gpus_are_counted_without_touching_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", None)
    assert [resolve(name) for name in ("cuda", "cuda:0", "cuda:1")] == ["cuda", "cuda:0", "cuda:1"]
    with pytest.raises(InputError, match="no cuda:2 here; choose among cpu, cuda:0, cuda:1"):
        resolve("cuda:2")
