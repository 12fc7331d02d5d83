"""Runs the stages of one configuration, each from the store if it is there."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pipeline.run import checks, peers, workers
from pipeline.run.chain import Chain, chain
from pipeline.run.devices import placed, resolve
from pipeline.run.measured import CONVERSION, RUNNING, Measured, per_site, row
from pipeline.run.models import ModelSource
from pipeline.run.settings import Settings
from pipeline.run.stage import Running, Stage
from pipeline.store.store import Artifact, Store
from stages.compiler import compiled, use_compiler
from stages.fitted import Conversion, FittedNeurons

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
COMMAND = "python -m pipeline"


@dataclass
class Run:
    """The stages of one configuration and the artifacts that are there, by label in their order."""

    store: Store
    chain: Chain
    runtime: Running | None = None  # None: nothing is built
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    compiled: bool = True  # whether all kernels of its workers were

    @property
    def settings(self) -> Settings:
        return self.chain.settings

    @property
    def model(self) -> ModelSource:
        return self.chain.model

    def using(self) -> AbstractContextManager[None]:
        """Have `store gc` leave what the run is made of, and what it builds, while the context is open."""
        every = self.chain.sources | self.chain.steps
        return self.store.using(stage.key() for stage in every.values())

    def build(self, stage: Stage, by_workers: bool = False) -> Artifact:
        """The artifact of a stage, logged with its seconds or as a hit; one that this run's workers have
        built is none."""
        artifact = stage.build(self.store, self.runtime)
        artifact = replace(artifact, hit=artifact.hit and not by_workers)
        state = "cached" if artifact.hit else "built"
        log.info("%-24s %-6s %s  %.1f s", stage.label, state, artifact.key[:8], artifact.seconds)
        self._tell_execution(stage, artifact)
        self.artifacts[stage.label] = artifact
        return artifact

    def share_out(self, command: str) -> None:
        """Let workers build what is missing."""
        assert self.runtime is not None
        built = partial(self.build, by_workers=True)
        every = [*self.chain.steps.values()]
        shared = (every, self.store, self.settings, self.runtime, command)
        self.compiled = workers.share_out(*shared, work, built)

    def _tell_execution(self, stage: Stage, artifact: Artifact) -> None:
        """Log where spikes were executed otherwise than this run is asked to."""
        if not artifact.hit or stage.name != "evaluation" or not stage.spec["coding"].converts:
            return
        made = artifact.manifest["runtime"].get("execution")
        if made not in (None, self.settings.runtime.execution):
            log.info("%s is that of runtime.execution=%s, not executed again", stage.label, made)

    @property
    def measured(self) -> Measured[Artifact]:
        """The artifacts of what is measured, which are all there."""
        return self.chain.measured.map(lambda stage: self.artifacts[stage.label])

    @property
    def device(self) -> str:
        """Where the run computes; of a cluster, where what it has measured was computed."""
        spec = self.settings.runtime
        if spec.workers == 1 or spec.engine == "local":
            return str(self.store.runtime["device"])
        made = [each.manifest for each in self.artifacts.values() if each.stage in RUNNING]
        return ", ".join(sorted({record["runtime"]["device"] for record in made}))

    def collect(self) -> tuple[dict[str, Any], pd.DataFrame]:
        """What the artifacts of a whole run hold: the row of result.json, and the per-site table."""
        measured = self.measured
        sites = per_site(measured)
        return row(self.settings, self.model.fingerprint, measured, sites, self.artifacts), sites


def start(settings: Settings, command: str = COMMAND, worker: bool = False) -> Run:
    """Finds the device and the stages; nothing is loaded or built before it is needed.

    `command` is the one that an exported model says it was made by; `worker`: this process is one.
    """
    checks.configured(settings)
    alone = settings.runtime.workers == 1 or settings.runtime.engine == "local"
    device = resolve(settings.runtime.device) if alone or worker else "cpu"  # here nothing is built
    if settings.runtime.threads is not None:
        torch.set_num_threads(settings.runtime.threads)
    use_compiler(settings.runtime.compile, settings.store.kernels.absolute())
    how = asdict(settings.runtime) | {"device": device}
    store = settings.store.open(how)
    steps = chain(settings, store, device)
    checks.described(steps)
    return Run(store, steps, Running.of(settings.runtime, device, command))


def stored(settings: Settings) -> tuple[Run, list[str]]:
    """A run as the store holds it, without building anything, and the labels of what is missing."""
    store = settings.store.open()
    run = Run(store, chain(settings, store))
    artifacts = {label: store.find(stage.step) for label, stage in run.chain.steps.items()}
    run.artifacts = {label: each for label, each in artifacts.items() if each is not None}
    return run, [label for label in artifacts if label not in run.artifacts]


def execute(settings: Settings, command: str = COMMAND) -> tuple[dict[str, Any], pd.DataFrame, Run]:
    """All stages of one run: the result, the per-site table, and the artifacts behind them."""
    run = start(settings, command)
    steps = run.chain
    if steps.export is not None:
        settings.export.check_free(steps.export.key())
    assert run.runtime is not None
    with run.using():
        checks.complete(steps, run.store, run.runtime)
        if settings.runtime.workers > 1:
            run.share_out(command)
        for stage in steps.steps.values():
            artifact = run.artifacts.get(stage.label) or run.build(stage)
            if stage is steps.prefix:
                checks.behind_prefix(settings, artifact)
            if stage is steps.export:
                settings.export.place(artifact.path, artifact.key)
                log.info("exported: %s", settings.export.folder or artifact.path)
        run.artifacts = {label: run.artifacts[label] for label in steps.steps}  # in their order
        result, sites = run.collect()
    return result | {"compiled": compiled() and run.compiled}, sites, run


def work(order: workers.Order) -> None:
    """Build what is missing of a run, as one worker of several."""
    with placed(order.settings) as settings:
        run = start(settings, order.command, worker=True)
        assert run.runtime is not None
        every = [*run.chain.steps.values()]
        workers.check_keys(order, every)

        def check(stage: Stage, artifact: Artifact) -> None:
            if stage is run.chain.prefix:
                checks.behind_prefix(settings, artifact)

        offloaded = settings.runtime.offload is not None
        with run.using():
            peers.work(every, run.store, run.runtime, order.worker, offloaded, check)


def convert(run: Run) -> Conversion:
    """The conversion of a run: statistics, capture, distribution, fitting, patching."""
    steps = run.chain
    assert steps.fitting is not None and steps.patching is not None
    for stage in steps.steps.values():
        if stage.name in CONVERSION:
            run.build(stage)
    fitted = FittedNeurons.load(run.artifacts[steps.fitting.label].path)
    return Conversion(run.settings.coding, fitted)
