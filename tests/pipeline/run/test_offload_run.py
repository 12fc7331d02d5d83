"""`runtime=offload`: another way to the same artifacts."""

import pytest
from safetensors.torch import load_file

from pipeline.run import models, runner
from stages.model.offload import offloaded

OFFLOAD = ("runtime=offload", "runtime.offload.boundary=disk", "runtime.batch=4")


def test_a_run_from_disk_has_the_keys_and_results_of_one_in_memory(settings, tmp_path):
    models.forget()
    there, sites, _ = runner.execute(settings(tmp_path / "memory"))
    models.forget()
    lazy, own, run = runner.execute(settings(tmp_path / "disk", *OFFLOAD))
    assert offloaded(run.model.load()[0]) is not None
    assert lazy["keys"] == there["keys"] and not any(lazy["hits"].values())
    assert lazy["evaluation"] == there["evaluation"] and own.equals(sites)
    sketches = [
        load_file(tmp_path / where / "capture" / there["keys"]["capture"] / "sketch.safetensors")
        for where in ("memory", "disk")
    ]
    assert all((sketches[0][name] == sketches[1][name]).all() for name in sketches[0])
    models.forget()
    again, *_ = runner.execute(settings(tmp_path / "memory", *OFFLOAD))
    assert all(again["hits"].values())
    models.forget()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evaluation.tasks=[piqa]", "evaluation.tasks=[]"),
        ("transform=rotate", "transform=none"),
        ("coding=gated_budget", "coding=gated"),
        ("coding=gif_smoothed", "asks no gradients"),
    ],
)
def test_what_needs_the_whole_model_is_refused_before_anything_runs(
    override, says, command, tmp_path
):
    done = command(tmp_path, "experiment=null", *OFFLOAD, override)
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if "runtime=offload" in line]
    assert says in line
    assert not list((tmp_path / "outputs").glob("store/capture/*"))
