"""The dashboard's views: runs with their numbers, and log perplexity against energy of one model each.

MLflow keeps a view in a tag of the experiment, lists it by its name under "Views", and opens it by
`/#/experiments/ID/runs?viewStateShareKey=KEY`: `runs`, `energy-MODEL`, and `energy`, that of the model
logged last, which is not listed. A scatter plot has neither a logarithmic axis nor a filter, so that it
draws the logarithm of the perplexity, and each model has its view.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

TAG = "mlflow.sharedViewState."
SECTION = "comparison"
PERPLEXITY, MEASURE = "ppl_", "nll_"  # of every corpus: the perplexity and its logarithm
COLUMNS = ("saving", "spikes_per_value", "nmse")  # of runs, behind perplexities and energy
HEIGHT = 420  # pixels of a plot


def updates(tags: Mapping[str, str], model: str | None, metrics: Iterable[str]) -> dict[str, str]:
    """The tags of an experiment with `tags` that change for the views to show a run's metrics."""
    new = [name for name in metrics if name.startswith(MEASURE)]
    if model is None or not new:
        return {}
    key = f"energy-{re.sub(r'[^A-Za-z0-9_.-]', '_', model)}"
    drawn = [chart["uuid"] for chart in _state(tags, key).get("compareRunCharts", ())]
    title = f"{model}: log perplexity against energy"
    energy = _energy(model, title, dict.fromkeys([*drawn, *new]))
    known = _state(tags, "runs").get("selectedColumns", ())
    columns = [name for name in known if name.startswith(f"metrics.`{PERPLEXITY}")]
    columns += [_column(PERPLEXITY + name.removeprefix(MEASURE)) for name in new]
    views = {key: _view(title, energy), "energy": json.dumps(energy)}
    views["runs"] = _view("runs with their numbers", _runs(columns))
    return {TAG + key: view for key, view in views.items() if tags.get(TAG + key) != view}


def quoted(value: str) -> str:
    """A value as MLflow's searches read it, which know no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"


def _view(name: str, state: Mapping[str, Any]) -> str:
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def _state(tags: Mapping[str, str], key: str) -> dict[str, Any]:
    """What a view shows; empty where there is none."""
    view = json.loads(tags.get(TAG + key, "{}"))
    return dict(json.loads(view["state"])) if "state" in view else dict(view)


def _column(metric: str) -> str:
    return f"metrics.`{metric}`"


def _runs(perplexities: Iterable[str]) -> dict[str, Any]:
    """All runs, the latest first, sweeps above their jobs."""
    numbers = map(_column, ("energy_J", *COLUMNS))
    return {
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": [*dict.fromkeys([*perplexities, *numbers])],
    }


def _energy(model: str, title: str, measures: Iterable[str]) -> dict[str, Any]:
    """Jobs sorted by energy, for those sorted by time hang below their sweeps."""
    section = {"uuid": SECTION, "name": title, "columns": 1, "cardHeight": HEIGHT}
    shown = ["tags.kind = 'job'", "attributes.status = 'FINISHED'", f"tags.model = {quoted(model)}"]
    chart = {"type": "SCATTER", "metricSectionId": SECTION, "deleted": False, "isGenerated": False}
    chart |= {"runsCountToCompare": 1000, "xaxis": {"key": "energy_J", "type": "METRIC"}}
    return {
        "searchFilter": " and ".join(shown),
        "orderByKey": _column("energy_J"),
        "orderByAsc": True,
        "runsHiddenMode": "SHOWALL",
        "selectedColumns": [_column(name) for name in ("energy_J", *measures)],
        "compareRunSections": [section | {"display": True, "isReordered": False}],
        "isAccordionReordered": True,  # else MLflow puts the charts that it makes first
        "compareRunCharts": [
            chart | {"uuid": name, "yaxis": {"key": name, "type": "METRIC"}} for name in measures
        ],
    }
