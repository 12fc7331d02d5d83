"""The metrics of NeuroBench of a run, beside its energy and on the same counters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.run.measured import Measured
from pipeline.store.store import Artifact
from stages.analysis.neurobench import metrics
from stages.evaluation import Perplexity
from stages.fitted import Conversion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "neurobench.json"


def write(
    out: Path, model: PreTrainedModel, measured: Perplexity, conversion: Conversion | None
) -> None:
    """Write the metrics of a model with these neurons, from its evaluation on a corpus."""
    windows, length = measured.metrics["windows"], measured.metrics["length"]
    sample = {"sample": f"a window of {length} tokens"}
    result = metrics(model, measured.counters, windows, conversion)
    (out / FILE).write_text(json.dumps(sample | result, indent=1))


def read(measured: Measured[Artifact]) -> dict[str, Any]:
    """The metrics of a run, on the first corpus."""
    return dict(json.loads((measured.energy.path / FILE).read_text()))
