"""What a plan predicts: by hand at rates that are easy to divide by, and of 70 billion weights."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace

import pytest
import torch

from pipeline.commands.prediction import Prediction, Shape
from pipeline.commands.schedule import schedule
from pipeline.commands.stage_table import Forecasts
from pipeline.run import chain as chains
from pipeline.run import rates
from pipeline.run.jobs import jobs
from pipeline.run.rates import Rates, of_worker
from pipeline.store.store import Store
from stages.errors import InputError
from tests.pipeline.conftest import main_in

# Of the model of `tiny_run`: 2 layers, 32 wide, 48 inside, 4 heads of 8 on 2 of keys, 258 tokens.
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
OUTSIDE = 2 * 258 * 32 + 32
WEIGHTS = 4 * (2 * (LAYER + 2 * 32) + OUTSIDE)  # bytes
PAIRS = 48 * 49 // 2  # of a window
MACS = 2 * (48 * LAYER + PAIRS * 2 * 32)
RATES = Rates(1e6, 1e5, 1e4, 1e3, "cpu", "by hand")
OVER = {
    "start": 3.0,
    "stage": 0.5,
    "process": 1e6,
    "load": 2.0,
    "elements": 0.0,
    "capture": 0.0,
    "compile": 9.0,
}
OVER |= {"counted": 5.0, "fitting": 0.25}
PLAIN = [
    "coding=gated",
    "runtime.batch=1",
    *(f"plan.overhead.cpu.{k}={v}" for k, v in OVER.items()),
]


@pytest.fixture
def predicted(tiny_run, tmp_path):
    """The costs of a job's stages by label at those rates, each without the others, for the worker with
    most to do, with what all workers send."""

    def costs(*more: str):
        (job,) = jobs([*tiny_run.overrides, *PLAIN, *more])
        steps = chains.chain(job.settings, Store(tmp_path / "store")).steps
        made = Prediction(job.settings, RATES, Shape(job.settings.model.config()))
        loads = {label: made.of(step) for label, step in steps.items()}
        workers, free = job.settings.runtime.workers, {label: set() for label in loads}
        alone = {each: schedule({each: load}, free, workers)[each] for each, load in loads.items()}
        costs = {n: replace(done.most, sent=done.all.sent) for n, done in alone.items()}
        return {"start": made.start()} | costs

    return costs


def test_stages_of_one_worker_are_computed_by_hand(predicted):
    costs = predicted()
    start, capture, fitting = (costs[name] for name in ("start", "capture", "fitting"))
    assert start.read == pytest.approx(WEIGHTS, rel=0.1)  # and a header
    assert start.seconds == pytest.approx(3 + max(2 * WEIGHTS / 1e5, start.read / 1e4))
    assert (start.bound, start.held) == ("disk", 1e6 + WEIGHTS)
    # Four windows of 48 tokens, the head sees the last of each; products are two operations each.
    assert capture.compute == pytest.approx(4 * 2 * (MACS + 258 * 32) / 1e6)
    assert capture.seconds == pytest.approx(0.5 + capture.compute)
    assert (capture.read, capture.sent, capture.bound) == (0, 0, "compute")
    assert fitting.seconds == pytest.approx(0.25 * 21)  # sites
    spikes = costs["evaluation ppl_wikipedia"]
    values = 2 * (48 * (32 * 4 + 2 * 16 + 3 * 48) + 4 * PAIRS) + 48 * 32
    assert spikes.memory == pytest.approx(3 * values * 5 * 2 * 4 / 1e5)
    assert spikes.compute == pytest.approx(3 * 2 * (MACS + 48 * 258 * 32) / 1e6)


def test_workers_share_batches_and_send_what_each_leaves(predicted):
    alone, shared = predicted(), predicted("runtime.workers=3", "runtime.engine=slurm")
    assert 2 * shared["capture"].compute == pytest.approx(alone["capture"].compute)  # two of four
    name = "evaluation ppl_wikipedia"
    assert 3 * shared[name].compute == pytest.approx(alone[name].compute)
    assert shared[name].sent == 3 * 21 * 7 * 8  # counters of three windows
    assert shared[name].network == pytest.approx((1 + 3) * 21 * 7 * 8 / 1e3)
    assert shared["fitting"] == alone["fitting"]
    assert shared["start"].fixed == 2 * alone["start"].fixed  # one process starts the others


def test_statistics_that_add_up_by_batches_are_shared_too(predicted):
    asked = ("coding.centre=channel", "coding.granularity=channel", "timesteps=3")
    alone = predicted(*asked)
    shared = predicted(*asked, "runtime.workers=3", "runtime.engine=slurm")
    for name in ("channel_means", "channel_scales", "channel_mean"):
        label = f"statistics {name}"
        assert 2 * shared[label].compute == pytest.approx(alone[label].compute)
        assert alone[label].sent == 0 < shared[label].sent
    channels = 2 * (4 * 32 + 2 * 16 + 3 * 48) + 32
    assert shared["statistics channel_scales"].sent == 4 * 4 * channels  # the largest of each


def test_layers_on_disk_are_read_once_a_pass_while_one_computes(predicted):
    costs = predicted("runtime=offload", "runtime.batch=1")
    size = costs["start"].read or predicted()["start"].read
    capture = costs["capture"]
    assert costs["start"].read == 0
    assert capture.read == pytest.approx(size * (1 + 4 * OUTSIDE / WEIGHTS))
    assert capture.disk == pytest.approx(capture.read / 1e4)
    assert capture.seconds == pytest.approx(
        0.5 + max(capture.compute + capture.memory, capture.disk)
    )
    assert capture.held < predicted()["capture"].held


def test_rates_are_given_or_measured_or_of_a_known_machine(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, small in (("READ", 1 << 20), ("COPIED", 1 << 12), ("ROWS", 2), ("SECONDS", 0.0)):
        monkeypatch.setattr(rates, name, small)

    def of(*more: str) -> Rates:
        (job,) = jobs([*tiny_run.overrides, "coding=gated", f"store.path={tmp_path}", *more])
        return of_worker(job.settings, job.settings.model.config())

    known = of("plan.reference.cpu.flops.float32=8e9", "plan.reference.cpu.machine=M")
    assert known.flops == 8e9 and known.source.startswith("of M, ")
    four = of("plan.flops=8e9", "plan.memory=4e9", "plan.disk=4e8", "runtime.workers=4")
    assert (four.flops, four.memory, four.disk) == (2e9, 1e9, 1e8)
    assert four.source == "flops, memory, disk as given"
    apart = of("plan.flops=8e9", "runtime.workers=4", "runtime.engine=slurm")
    assert apart.flops == 8e9 and apart.source.startswith("flops as given, others of ")
    here = of("plan.measure=true")
    assert here.source.startswith("measured here ") and here.flops > 0
    assert of() == here and json.loads(rates.FILE.read_text())
    plan = jobs(["coding=gated"])[0].settings.plan
    with pytest.raises(InputError, match=r"plan\.flops=-1: give a rate"):
        replace(plan, flops=-1)
    with pytest.raises(InputError, match=r"plan\.overhead\.cpu\.start=None: give a finite number"):
        replace(plan, overhead={"cpu": plan.overhead["cpu"] | {"start": None}})
    settings = jobs([*tiny_run.overrides, "coding=gated"])[0].settings
    bare = replace(settings, plan=replace(settings.plan, reference={}))
    monkeypatch.setattr(rates, "FILE", tmp_path / "none.json")
    with pytest.raises(
        InputError, match=r"no rates of cpu in float32: measure .* plan\.measure=true"
    ):
        of_worker(bare, bare.model.config())


def test_machines_with_gpus_are_planned_on_one_without(tiny_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def of(*more: str) -> Rates:
        (job,) = jobs([*tiny_run.overrides, "coding=gated", *more])
        return of_worker(job.settings, job.settings.model.config())

    two = of("runtime.device=auto", "runtime.devices=[cuda:0,cuda:1]")
    assert two == of("runtime.device=cuda") and two.kind == "cuda"
    assert two.source.startswith("of an H200, ")
    for wrong in (["runtime.device=nothing"], ["runtime.device=cuda", "plan.measure=true"]):
        with pytest.raises(InputError, match="runtime.device: no .* here; choose among cpu"):
            of(*wrong)


def test_70_billion_weights_are_planned_without_hub_or_weights(tmp_path, monkeypatch, caplog):
    from pipeline.run import models

    def unreachable(*_: object) -> str:
        raise InputError("model X on the hub: the connection failed")

    monkeypatch.setattr(models, "commit", unreachable)
    overrides = ["plan", "model=llama2-70b", "runtime.workers=8", "runtime.engine=slurm"]
    begin = time.process_time()
    done = main_in(tmp_path, overrides)
    assert done.code == 0 and time.process_time() - begin < 3
    rows = {r[0]: r[1:] for r in re.findall(r"(?m)^([a-z_ ]+?)  +(.*)$", done.out)}
    start = rows["start"][0].split()
    assert start[-3:] == ["138", "–", "disk"] and float(start[0]) > 138
    assert "8 workers, each on a machine" in done.out and "llama2-70b in bfloat16" in done.out
    assert "capture has 4 batches of 4 windows for 8 workers" in done.out
    assert max(map(len, done.out.partition("llama2-70b in")[2].splitlines())) <= 120
    lazy = main_in(tmp_path, [*overrides, "runtime=offload", "evaluation.tasks=[]"])
    reads = re.findall(r"(?m)^(\w+).* (139|278) +(?:–|[\d.]+)  \w+$", lazy.out)  # the head's twice
    # Patching is for the worker that has fitted, and others take two of the windows.
    once, twice = ("capture", "energy"), ("patching", "evaluation", "evaluation")
    every = [*((name, "139") for name in once), *((name, "278") for name in twice)]
    assert sorted(reads) == sorted(every), lazy.out


def test_a_plan_of_one_job_shows_what_its_stages_took(tiny_run, tmp_path):
    job = ["coding=gated", *tiny_run.overrides, f"store.path={tmp_path / 'store'}"]
    before = main_in(tmp_path, ["plan", *job])
    assert main_in(tmp_path, [*job, "hydra.mode=RUN"]).code == 0
    after = main_in(tmp_path, ["plan", *job])
    rows = [re.search("(?m)^capture .*", done.out)[0].split() for done in (before, after)]
    assert rows[0] == [*rows[1][:2], *rows[1][3:]] and float(rows[1][2]) >= 0
    other = main_in(tmp_path, ["plan", *job, "model.dtype=bfloat16"])
    assert "from builds of other models: tokens wikipedia calibration" in other.out
    for stage in (
        "capture",
        "distribution",
        "fitting",
    ):  # those of another model are no measurement
        assert len(re.search(f"(?m)^{stage} .*", other.out)[0].split()) == len(rows[0])
    jobs_of, table = (
        float(re.search(p, other.out)[1]) for p in (r"about (\d+) s", r"(?m)^all +(\S+)")
    )
    assert jobs_of == pytest.approx(table - 13, abs=1)  # without start and finish


def test_what_is_stored_hides_nothing_of_what_is_missing(tiny_run, tmp_path):
    """Beside a stage that is built, another puts off the end by less than where it is built alone."""
    given = ("plan.flops=1e6", "plan.memory=1e5", "plan.disk=1e4", "plan.network=1e3")
    over = ("runtime.workers=2", "runtime.engine=slurm", "evaluation.windows=1")
    (job,) = jobs([*tiny_run.overrides, *PLAIN, *given, *over])
    steps, forecasts = chains.chain(job.settings, Store(tmp_path / "store")), Forecasts()
    every = forecasts.seconds(steps, [*steps.steps])
    alone = {label: forecasts.seconds(steps, [label]) for label in every}
    assert all({*found} == {label} for label, found in alone.items())
    more = {label: alone[label][label] - seconds for label, seconds in every.items()}
    assert max(more.values()) > 1


def test_a_plan_of_several_jobs_says_once_what_the_hub_lacks(tmp_path, monkeypatch, caplog):
    from pipeline.run import models

    def unreachable(*_: object) -> str:
        raise InputError("model X on the hub: the connection failed")

    monkeypatch.setattr(models, "commit", unreachable)
    wanted = ["coding=las,gated", "model=llama2-7b", "evaluation.tasks=[]"]
    with caplog.at_level("INFO"):
        done = main_in(tmp_path, ["plan", *wanted])
    assert done.code == 0 and caplog.text.count("the connection failed") == 1
    hours = re.search(r"2 jobs, \d+ artifacts to build: about (\S+) (\w+)", done.out)
    assert hours and float(hours[1]) * {"s": 1, "min": 60, "h": 3600}[hours[2]] > 60
