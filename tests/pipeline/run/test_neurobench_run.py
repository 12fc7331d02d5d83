"""NeuroBench's metrics in the folder of every job, beside its energy."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

CODINGS = {"dense": 1, "gated": 2 * 4, "lloyd_max": None}  # planes
SWEEP = ("experiment=none", f"coding={','.join(CODINGS)}", "timesteps=4", "evaluation.tasks=[]")


def test_every_row_has_them_as_the_energy_counts(command, tmp_path: Path) -> None:
    """Linear layers in windows of as many tokens as the energy is of; none of a bound."""
    done = command(tmp_path, "-m", *SWEEP)
    assert done.code == 0, done.err
    multiplied = set()
    for job, number in enumerate(CODINGS.values()):
        folder = done.runs / str(job)
        metrics = json.loads((folder / "neurobench.json").read_text())
        assert (metrics["neurobench"], metrics["sample"]) == ("2.3.0", "a window of 48 tokens")
        assert metrics["samples"] == done.results[job]["evaluation"]["wikipedia"]["windows"]
        assert metrics["Footprint"] > 0 == metrics["ConnectionSparsity"]
        if number is None:
            assert metrics["SynapticOperations"] is metrics["ActivationSparsity"] is None
            continue
        assert metrics["planes"] == {"least": number, "most": number}
        kinds = pd.read_csv(folder / "energy_by_kind.csv")
        linear = kinds.query("convention == 'causal' and phase == 'prefill' and kind == 'linear'")
        synops = metrics["SynapticOperations"]
        for ours, column in (("Effective_MACs", "macs_G"), ("Effective_ACs", "acs_G")):
            assert synops[ours] == pytest.approx(linear[column].item() * 1e9, rel=1e-12)
        multiplied.add(synops["Dense"] / number)
    assert len(multiplied) == 1
