"""Conversions of two machines that share a store behind an address."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.pipeline.conftest import Finished, half_written


def test_what_one_machine_has_converted_another_only_reads(
    command: Callable[..., Finished], tmp_path: Path
) -> None:
    address = f"store.path=file://{tmp_path}/remote"
    runs = []
    for name in ("one", "other"):
        machine = tmp_path / name
        machine.mkdir()
        runs.append(command(machine, "-m", "experiment=none", "coding=dense,gated", address))
        assert runs[-1].code == 0, runs[-1].err
        assert not half_written(machine / "outputs/cache")
        assert not (machine / "outputs/store").exists()
    built, read = (run.results for run in runs)
    assert not all(built[1]["hits"].values()) and all(read[1]["hits"].values())
    for here, there in zip(built, read, strict=True):
        assert here["keys"] == there["keys"] and here["ppl_wikipedia"] == there["ppl_wikipedia"]
    assert runs[0].table.read_bytes() == runs[1].table.read_bytes()
