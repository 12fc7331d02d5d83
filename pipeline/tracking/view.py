"""The dashboard's chart views: log perplexity against energy, the jobs of one model a view.

MLflow keeps the state of a shared view in a tag of the experiment and opens it by
`/#/experiments/ID/runs?viewStateShareKey=energy-MODEL`; `energy` alone is that of the model logged
last. A chart has neither a logarithmic axis nor a filter, so that it draws the logarithm
of the perplexity, and each model has its view.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

TAG = "mlflow.sharedViewState.energy"
SECTION = "comparison"
MEASURE = "nll_"  # of every corpus: the logarithm of the perplexity


def updates(tags: Mapping[str, str], model: str | None, metrics: Iterable[str]) -> dict[str, str]:
    """The tags of an experiment with `tags` that change for the views to show a run's metrics."""
    new = [name for name in metrics if name.startswith(MEASURE)]
    if model is None or not new:
        return {}
    tag = f"{TAG}-{re.sub(r'[^A-Za-z0-9_.-]', '_', model)}"
    drawn = [c["uuid"] for c in json.loads(tags[tag])["compareRunCharts"]] if tag in tags else []
    state = json.dumps(_state(model, dict.fromkeys([*drawn, *new])))
    return {name: state for name in (tag, TAG) if tags.get(name) != state}


def quoted(value: str) -> str:
    """A value as MLflow's searches read it, which know no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"


def _state(model: str, measures: Iterable[str]) -> dict[str, Any]:
    """Jobs sorted by energy, for those sorted by time hang below their sweeps."""
    section = {"uuid": SECTION, "name": f"{model}: log perplexity against energy"}
    shown = ["tags.kind = 'job'", "attributes.status = 'FINISHED'", f"tags.model = {quoted(model)}"]
    chart = {"type": "SCATTER", "metricSectionId": SECTION, "deleted": False, "isGenerated": False}
    chart |= {"runsCountToCompare": 1000, "xaxis": {"key": "energy_J", "type": "METRIC"}}
    return {
        "searchFilter": " and ".join(shown),
        "orderByKey": "metrics.`energy_J`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOWALL",
        "selectedColumns": [f"metrics.`{name}`" for name in ("energy_J", *measures)],
        "compareRunSections": [section | {"display": True, "isReordered": False}],
        "isAccordionReordered": True,  # else MLflow puts the charts that it makes first
        "compareRunCharts": [
            chart | {"uuid": name, "yaxis": {"key": name, "type": "METRIC"}} for name in measures
        ],
    }
