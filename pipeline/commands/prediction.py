"""What the stages of a conversion will take, from the dimensions of a model and the speed of a machine.

Nothing of the model is loaded but its config. The arithmetic is that of a roofline: matrix products at
the machine's rate of operations, everything else at that of its memory, weights at that of its disk, what
workers leave for each other at that of the network; how much there is of everything else was measured
(`plan.overhead`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.commands.schedule import Cost, Load
from pipeline.run.peers import TOGETHER
from pipeline.run.rates import Rates
from pipeline.run.settings import Settings
from pipeline.run.shares import Cut, batches
from pipeline.run.stage import Stage
from stages.analysis.footprint import Resident, resident, share_bytes, site_plan
from stages.analysis.operations import operations
from stages.analysis.work import work
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
START, FINISH = "start", "finish"


class Shape:
    """A model by its dimensions: without weights, its sites, and its operations."""

    def __init__(self, config: Any) -> None:
        self.model = meta_model(config)
        self.sites: list[Site] = find_sites(self.model)
        self.operations = operations(self.model, self.sites)


class Prediction:
    """What stages of one configuration cost at the rates of one worker."""

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

    def finish(self) -> Cost:
        """The process draws figures, logs and prints the table."""
        return Cost(fixed=self._over["finish"], held=self._over["process"])

    def of(self, stage: Stage) -> Load | None:
        """What a stage costs, None where its size is known once its text has been read."""
        spec, over = stage.spec, self._over
        if stage.name == "statistics":
            return self._statistic(stage)
        if stage.name in ("capture", "patching", "prefix"):
            return self._calibrated(stage.name, spec)
        if stage.name == "evaluation":
            return self._evaluated(stage)
        if stage.name in ("distribution", "fitting"):
            kind = stage.name
            if kind == "fitting" and spec["coding"].trained:
                kind = "sampled" if self.settings.fitting.data == "samples" else "trained"
            return Load((Cost(memory=len(self._sites) * over[kind], held=over["process"]),))
        if stage.name == "energy":
            return Load((self._energy(),))
        if stage.name == "export":
            return Load((Cost(disk=self.file_bytes / self.rates.disk, held=self._held()),))
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

    def _calibrated(self, name: str, spec: Any) -> Load:
        s, length = self.settings, spec["length"]
        if name == "prefix":
            return self._windows([spec["windows"]], length, s.runtime.batch, "dense", logits=1)
        windows = s.patching.windows if name == "patching" else spec["windows"]
        units = self._batches(windows, s.runtime.batch)
        load = self._windows(units, length, s.runtime.batch, name, logits=1)
        if name == "capture":
            return self._capturing(load, spec["windows"], length)
        return load

    def _statistic(self, stage: Stage) -> Load:
        """Of a statistic that adds up by batches each is a unit, another is one."""
        s, spec, statistic = self.settings, stage.spec, stage.spec["statistic"]
        windows, batch = statistic.reads(spec["windows"], s.runtime.batch)
        passes = s.plan.passes.get(statistic.name, 1.0) * getattr(statistic, "epochs", 1)
        shared = isinstance(stage, Cut)
        units = self._batches(windows, batch) if shared else [windows]
        load = self._windows(units, spec["length"], batch, "capture", [passes] * len(units), 1)
        if not shared:
            return load
        left = self._left(statistic, spec["windows"] * spec["length"], batch, spec["length"])
        return self._merged(load, left)

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

    def _capturing(self, load: Load, windows: int, length: int) -> Load:
        """Sketches in memory, and what batches leave of them."""
        s, bits = self.settings, self.settings.capture.mantissa_bits
        tokens = windows * length
        sketch = site_plan(self._model, self._sites, bits, self._dtype, tokens)
        held = sketch["sketch"].sum()
        if self._offloaded:
            held = sketch.groupby("layer")["sketch"].sum().max()
        batch = s.runtime.batch * length
        part = share_bytes(self._model, self._sites, bits, self._dtype, batch)
        units = tuple(replace(unit, held=unit.held + held) for unit in load.units)
        return self._merged(replace(load, units=units), part)

    def _evaluated(self, stage: Stage) -> Load | None:
        """Of perplexity a batch of windows is a unit, of `anytime` all after some of the steps."""
        spec, size = stage.spec, self.settings.runtime.evaluation_batch
        coding, counted = spec["coding"], spec["perturbation"] is None
        if "task" in spec:
            return self._asked(stage)
        if spec["count"] == ALL:
            return None
        what = "counted" if coding.converts else "dense_counted"
        if not counted:
            what = "spiking" if coding.converts else "dense"
        units, passes = self._batches(spec["count"], size), None
        if "anytime" in spec:
            passes = [*(self._over["step"] * t for t in range(1, coding.timesteps)), 1.0]
            units = [spec["count"]] * len(passes)
        load = self._windows(units, spec["length"], size, what, passes)
        return self._merged(load, COUNTED * len(self._every) * counted)

    def _asked(self, stage: Stage) -> Load:
        s, spec = self.settings, stage.spec
        sequences, length = s.plan.questions.get(spec["task"].name, s.plan.questions["other"])
        what = "spiking" if spec["coding"].converts else "dense"
        units = [number * sequences for number in _parts(spec["items"], AT_ONCE)]
        load = self._windows(units, length, s.runtime.task_batch, what)
        return replace(load, once={**load.once, stage.label: Cost(fixed=self._over["task"])})

    def _batches(self, windows: int, batch: int) -> list[int]:
        """Windows of the units of a stage that is cut into batches; of layers from disk a worker takes
        several at once, as `peers` does."""
        workers, together = self.settings.runtime.workers, 1
        if self._offloaded:
            together = math.ceil(batches(windows, batch) / workers)
            together = min(TOGETHER, together) if workers > 1 else together
        return _parts(windows, batch * together)

    def _windows(
        self,
        units: Sequence[int],
        length: int,
        batch: int,
        what: str,
        passes: Sequence[float] | None = None,
        logits: int = 0,
    ) -> Load:
        """Units of so many windows through the model, each of them in batches and `passes` times."""
        rates, over, itemsize = self.rates, self._over, self._dtype.itemsize
        one = work(self._plan, self._sites, length, logits)
        numbers = one.elements * over["elements"] + one.values * over.get(what, 0.0)
        read, width = self._read_again(), self._model.config.hidden_size
        wide = batch * length * (width * 6 + self._inner * 3)
        head = batch * (logits or length) * self._model.config.get_text_config().vocab_size
        held = self._held() + (wide + head) * itemsize

        def cost(number: int, passes: float) -> Cost:
            products = number * 2 * one.macs / rates.flops
            streamed = batches(number, batch) * self.weights.weights / rates.memory
            moved = number * numbers * 2 * itemsize
            hidden = number * length * width * itemsize
            return Cost(
                compute=passes * max(products, streamed),
                memory=passes * (moved / rates.memory) + self._converted(read),
                disk=passes * read / rates.disk,
                read=passes * read,
                held=held + (hidden if self._offloaded else self.weights.weights),
            )

        every = zip(units, passes or [1.0] * len(units), strict=True)
        written = Cost(fixed=over["stage"])
        return Load(tuple(cost(*unit) for unit in every), self._compiled(what), written)

    def _compiled(self, what: str) -> dict[str, Cost]:
        """What a process compiles once: for capture, or for the codings, whose tables or whose graphs."""
        if what.startswith("dense") or not self.settings.runtime.compile:
            return {}
        coding, name = self.settings.coding, "compile_coded"
        if what == "capture":
            name = "compile"
        elif coding.tokenwise or coding.replaces_softmax:
            name = "compile_graphs"
        times = 1 if self.settings.store.kernels.is_dir() else self._over["cold"]
        return {name: Cost(fixed=times * self._over[name])}

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

    def _merged(self, load: Load, part: float) -> Load:
        """With what units leave, so many bytes each: who builds one writes it, and one reads all."""
        if self.settings.runtime.workers == 1:
            return load
        apart = self.settings.runtime.engine != "local" or self.settings.store.remote
        seconds = part / (self.rates.network if apart else self.rates.disk)
        units = tuple(replace(unit, network=seconds, sent=part) for unit in load.units)
        return replace(load, units=units, merge=replace(load.merge, network=len(units) * seconds))


def _parts(number: int, size: int) -> list[int]:
    """A number as parts of some size, and the rest."""
    return [min(size, number - first) for first in range(0, number, size)]
