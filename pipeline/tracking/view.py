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
COLUMNS = ("energy_J", "saving", "spikes_per_value", "nmse")  # of runs, behind perplexities


def updates(tags: Mapping[str, str], model: str | None, metrics: Iterable[str]) -> dict[str, str]:
    """The tags of an experiment with `tags` that change for the views to show a run's metrics."""
    corpora = [name.removeprefix(MEASURE) for name in metrics if name.startswith(MEASURE)]
    if model is None or not corpora:
        return {}
    key = f"energy-{re.sub(r'[^A-Za-z0-9_.-]', '_', model)}"
    drawn = [chart["uuid"] for chart in _state(tags, key).get("compareRunCharts", ())]
    measures = dict.fromkeys([*drawn, *(MEASURE + corpus for corpus in corpora)])
    title = f"{model}: log perplexity against energy"
    energy = _energy(model, title, measures)
    numbers = _columns(COLUMNS)
    known = [c for c in _state(tags, "runs").get("selectedColumns", ()) if c not in numbers]
    known += _columns(PERPLEXITY + corpus for corpus in corpora)
    # all runs, the latest first, sweeps above their jobs
    runs = {"orderByKey": "attributes.start_time", "orderByAsc": False}
    runs["selectedColumns"] = [*dict.fromkeys(known), *numbers]
    views = {key: _listed(title, energy), "energy": json.dumps(energy)}
    views["runs"] = _listed("runs with their numbers", runs)
    return {TAG + key: view for key, view in views.items() if tags.get(TAG + key) != view}


def quoted(value: str) -> str:
    """A value as MLflow's searches read it, which know no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"


def _listed(name: str, state: Mapping[str, Any]) -> str:
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def _state(tags: Mapping[str, str], key: str) -> dict[str, Any]:
    """What a view shows; empty where there is none."""
    view = json.loads(tags.get(TAG + key, "{}"))
    return dict(json.loads(view["state"])) if "state" in view else dict(view)


def _columns(metrics: Iterable[str]) -> list[str]:
    return [f"metrics.`{metric}`" for metric in metrics]


def _energy(model: str, title: str, measures: Iterable[str]) -> dict[str, Any]:
    """Jobs sorted by energy, for those sorted by time hang below their sweeps."""
    columns = _columns(("energy_J", *measures))
    shown = ["tags.kind = 'job'", "attributes.status = 'FINISHED'", f"tags.model = {quoted(model)}"]
    section = {"uuid": SECTION, "name": title, "columns": 1, "cardHeight": 420}  # pixels
    chart = {"type": "SCATTER", "metricSectionId": SECTION, "deleted": False, "isGenerated": False}
    chart |= {"runsCountToCompare": 1000, "xaxis": {"key": "energy_J", "type": "METRIC"}}
    plots = [chart | {"uuid": y, "yaxis": {"key": y, "type": "METRIC"}} for y in measures]
    return {
        "searchFilter": " and ".join(shown),
        "orderByKey": columns[0],
        "orderByAsc": True,
        "runsHiddenMode": "SHOWALL",
        "selectedColumns": columns,
        "compareRunSections": [section | {"display": True, "isReordered": False}],
        "isAccordionReordered": True,  # else MLflow puts the charts that it makes first
        "compareRunCharts": plots,
    }
