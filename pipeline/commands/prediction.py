"""What the stages of a conversion will take, from the dimensions of a model and the speed of a machine.

Nothing of the model is loaded but its config. The arithmetic is that of a roofline: matrix products at
the machine's rate of operations, everything else at that of its memory, weights at that of its disk, what
workers leave for each other at that of the network; how much there is of everything else was measured
(`plan.overhead`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.run.rates import Rates
from pipeline.run.settings import Settings
from pipeline.run.shares import Cut
from pipeline.run.stage import Stage
from stages.analysis.footprint import Resident, resident, share_bytes, site_plan
from stages.analysis.operations import operations
from stages.analysis.work import Work, work
from stages.fits.sensitivity import CELLS, Sensitivity
from stages.fits.statistics import ChannelMean, ChannelScale, ChannelScales, Statistic
from stages.model.loading import meta_model
from stages.model.sites import find_sites, select
from stages.text.answers import AT_ONCE
from stages.text.corpus import ALL

if TYPE_CHECKING:
    from stages.model.sites import Site

BITS16 = 2  # bytes of a weight on the hub
FLOAT32 = 4
FLOAT64 = 8
COUNTED = 7 * FLOAT64  # bytes of the counters of a site
START = "start"


@dataclass(frozen=True)
class Cost:
    """Of a stage, for the worker that has most to do.

    Seconds by what takes them: `compute`, `memory`, `disk`, `network`, and `fixed`, whatever its size;
    bytes that it reads as weights, that all workers send through the store, and that it holds.
    """

    compute: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    network: float = 0.0
    fixed: float = 0.0
    read: float = 0.0
    sent: float = 0.0
    held: float = 0.0

    @property
    def seconds(self) -> float:
        """What is computed, while the next layer is read, and what is sent."""
        return self.fixed + max(self.compute + self.memory, self.disk) + self.network

    @property
    def bound(self) -> str:
        """What takes most of it."""
        parts = {name: getattr(self, name) for name in ("compute", "memory", "disk", "network")}
        return max({**parts, "start": self.fixed}.items(), key=lambda part: part[1])[0]


@dataclass(frozen=True)
class SharedOut:
    """How batches are shared out: `units` of them, `each` for the worker that has most."""

    units: int
    each: int

    @classmethod
    def of(cls, number: int, size: int, workers: int) -> SharedOut:
        units = math.ceil(number / size)
        return cls(units, math.ceil(units / workers))


class Shape:
    """A model by its dimensions: without weights, its sites, and its operations."""

    def __init__(self, config: Any) -> None:
        self.model = meta_model(config)
        self.sites: list[Site] = find_sites(self.model)
        self.operations = operations(self.model, self.sites)


class Prediction:
    """The costs of stages of one configuration at the rates of one worker."""

    def __init__(self, settings: Settings, rates: Rates, shape: Shape) -> None:
        self.settings, self.rates = settings, rates
        self._over: Mapping[str, float] = settings.plan.overhead[rates.kind]
        self._model, self._every, self._plan = shape.model, shape.sites, shape.operations
        self._dtype: torch.dtype = getattr(torch, settings.model.dtype)
        self._offloaded = settings.runtime.offload is not None

    def start(self) -> Cost:
        """A process begins, which starts workers where there are several: imports, and weights where they
        stay in memory."""
        fixed = self._over["start"] * min(2, self.settings.runtime.workers)
        if self._offloaded:
            return Cost(fixed=fixed, held=self._held())
        read = self.file_bytes
        return Cost(
            memory=self._over["load"] * self.weights.weights / self.rates.memory,
            disk=read / self.rates.disk,
            fixed=fixed,
            read=read,
            held=self._held() + self.weights.weights,
        )

    def of(self, stage: Stage) -> Cost | None:
        """The cost of a stage, None where its size is known once its text has been read."""
        spec, over = stage.spec, self._over
        if stage.name == "statistics":
            return self._statistic(stage)
        if stage.name in ("capture", "patching", "prefix"):
            return self._calibrated(stage.name, spec)
        if stage.name == "evaluation":
            return self._evaluated(spec)
        if stage.name in ("distribution", "fitting"):
            kind = stage.name
            if kind == "fitting" and spec["coding"].trained:
                kind = "sampled" if self.settings.fitting.data == "samples" else "trained"
            return Cost(memory=len(self._sites) * over[kind], held=over["process"])
        if stage.name == "energy":
            return self._energy()
        if stage.name == "export":
            return Cost(disk=self.file_bytes / self.rates.disk, held=self._held())
        return None

    @cached_property
    def weights(self) -> Resident:
        return resident(self._model, self._dtype)

    @cached_property
    def file_bytes(self) -> float:
        """Bytes of the files that hold the weights: those of a folder, 16 bits each on the hub."""
        spec = self.settings.model
        if spec.path is not None:
            files = Path(spec.path).expanduser().glob("*.safetensors")
            return float(sum(file.stat().st_size for file in files))
        size = FLOAT32 if spec.gguf is not None else BITS16
        return self.weights.weights / self._dtype.itemsize * size

    @cached_property
    def _sites(self) -> list[Site]:
        return select(self._every, self.settings.sites)

    def _calibrated(self, name: str, spec: Any) -> Cost:
        s = self.settings
        windows = s.patching.windows if name == "patching" else spec["windows"]
        what, workers = name, None
        if name == "prefix":
            what, workers = "dense", 1
        cost = self._windows(windows, spec["length"], s.runtime.batch, what, 1.0, 1, workers)
        if name == "capture":
            return self._capturing(cost, windows, spec["length"])
        return cost

    def _statistic(self, stage: Stage) -> Cost:
        """Of a statistic that adds up by batches each worker has some, of another one worker all."""
        s, spec, statistic = self.settings, stage.spec, stage.spec["statistic"]
        windows, batch = statistic.reads(spec["windows"], s.runtime.batch)
        passes = s.plan.passes.get(statistic.name, 1.0) * getattr(statistic, "epochs", 1)
        workers = None if isinstance(stage, Cut) else 1
        cost = self._windows(windows, spec["length"], batch, "capture", passes, 1, workers)
        if workers == 1:
            return cost
        shared = SharedOut.of(windows, batch, s.runtime.workers)
        left = self._left(statistic, spec["windows"] * spec["length"], batch, spec["length"])
        return self._merged(cost, shared, left)

    def _left(self, statistic: Statistic, tokens: int, batch: int, length: int) -> float:
        """Bytes that a batch leaves of a statistic over so many tokens."""
        if isinstance(statistic, Sensitivity):
            return 2 * CELLS * FLOAT64 * len(self._sites)
        if isinstance(statistic, ChannelScale | ChannelMean):
            return share_bytes(self._model, self._sites, 7, self._dtype, batch * length)
        rows = batch
        if isinstance(statistic, ChannelScales):
            rows = min(statistic.kept(tokens), batch * length)
        plan = site_plan(self._model, self._sites, 7, self._dtype, tokens)
        return float(FLOAT32 * rows * plan["values"].sum())

    def _capturing(self, cost: Cost, windows: int, length: int) -> Cost:
        """Sketches in memory, and what batches leave of them."""
        s, bits = self.settings, self.settings.capture.mantissa_bits
        tokens = windows * length
        sketch = site_plan(self._model, self._sites, bits, self._dtype, tokens)
        held = sketch["sketch"].sum()
        if self._offloaded:
            held = sketch.groupby("layer")["sketch"].sum().max()
        shared = SharedOut.of(windows, s.runtime.batch, s.runtime.workers)
        batch = s.runtime.batch * length
        part = share_bytes(self._model, self._sites, bits, self._dtype, batch)
        return self._merged(replace(cost, held=cost.held + held), shared, part)

    def _evaluated(self, spec: Any) -> Cost | None:
        runtime = self.settings.runtime
        coding, counted = spec["coding"], spec["perturbation"] is None
        if "task" in spec:
            return self._asked(spec)
        if spec["count"] == ALL:
            return None
        what = "counted" if coding.converts else "dense_counted"
        if not counted:
            what = "spiking" if coding.converts else "dense"
        passes = 1.0
        if "anytime" in spec:
            steps = coding.timesteps
            passes += self._over["step"] * steps * (steps - 1) / 2
        size = runtime.evaluation_batch
        cost = self._windows(spec["count"], spec["length"], size, what, passes)
        shared = SharedOut.of(spec["count"], size, runtime.workers)
        return self._merged(cost, shared, COUNTED * len(self._every) * counted)

    def _asked(self, spec: Any) -> Cost:
        s = self.settings
        sequences, length = s.plan.questions.get(spec["task"].name, s.plan.questions["other"])
        what = "spiking" if spec["coding"].converts else "dense"
        shared = SharedOut.of(spec["items"], AT_ONCE, s.runtime.workers)
        mine = min(spec["items"], shared.each * AT_ONCE)
        cost = self._windows(mine * sequences, length, s.runtime.task_batch, what, workers=1)
        return replace(cost, fixed=cost.fixed + self._over["task"])

    def _windows(
        self,
        number: int,
        length: int,
        batch: int,
        what: str,
        passes: float = 1.0,
        logits: int = 0,
        workers: int | None = None,
    ) -> Cost:
        """So many windows through the model, `passes` times, shared out among all workers or so many."""
        rates, over, itemsize = self.rates, self._over, self._dtype.itemsize
        shared = SharedOut.of(number, batch, workers or self.settings.runtime.workers)
        mine = min(number, shared.each * batch)
        one: Work = work(self._plan, self._sites, length, logits)
        products = mine * 2 * one.macs / rates.flops
        streamed = shared.each * self.weights.weights / rates.memory
        numbers = one.elements * over["elements"] + one.values * over.get(what, 0.0)
        moved = mine * numbers * 2 * itemsize
        read = self._read_again()
        wide = batch * length * (self._model.config.hidden_size * 6 + self._inner * 3)
        head = batch * (logits or length) * self._model.config.get_text_config().vocab_size
        held = self._held() + (wide + head) * itemsize
        if self._offloaded:
            held += mine * length * self._model.config.hidden_size * itemsize
        else:
            held += self.weights.weights
        return Cost(
            compute=passes * max(products, streamed),
            memory=passes * (moved / rates.memory) + self._converted(read),
            disk=passes * read / rates.disk,
            fixed=over["stage"] + (over["compile"] if self._compiles(what) else 0),
            read=passes * read,
            held=held,
        )

    def _compiles(self, what: str) -> bool:
        return self.settings.runtime.compile and not what.startswith("dense")

    def _energy(self) -> Cost:
        """Weights that are zero are counted, which reads all of them."""
        read = self._read_again()
        memory = self.weights.weights / self.rates.memory + self._converted(read)
        return Cost(
            memory=memory,
            disk=read / self.rates.disk,
            fixed=self._over["energy"],
            read=read,
            held=self._held() + (0 if self._offloaded else self.weights.weights),
        )

    def _read_again(self) -> float:
        """Bytes of weights that a pass over the layers reads; embedding and head at both ends of it."""
        if not self._offloaded:
            return 0.0
        return self.file_bytes * (1 + self.weights.outside / self.weights.weights)

    def _converted(self, read: float) -> float:
        """Seconds that weights that are read take to become those of the model."""
        return self._over["load"] * self.weights.weights / self.rates.memory if read else 0.0

    def _held(self) -> float:
        """Bytes of a process, with two groups of layers where they come from disk."""
        held = self._over["process"]
        if self._offloaded:
            held += self.weights.layer + max(self.weights.layer, self.weights.outside)
        return held

    @cached_property
    def _inner(self) -> int:
        return max((o.work.per_token for o in self._plan if o.kind == "activation"), default=0)

    def _merged(self, cost: Cost, shared: SharedOut, part: float) -> Cost:
        """With what all batches leave: the worker writes its own, and one reads them all."""
        if self.settings.runtime.workers == 1:
            return cost
        network = (shared.each + shared.units) * part / self.rates.network
        return replace(cost, network=network, sent=shared.units * part)
