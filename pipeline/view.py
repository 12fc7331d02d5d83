"""The dashboard's chart view of all jobs: perplexity against energy and spikes, kept by the experiment.

MLflow keeps the state of a shared view in a tag of the experiment and opens it by
`/#/experiments/ID/runs?viewStateShareKey=energy`. Its charts have no logarithmic axis, so that each
perplexity is drawn as it is and, for sweeps in which codings diverge, as its logarithm.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

TAG = "mlflow.sharedViewState.energy"
SECTION = "comparison"


def with_charts(state: str | None, result: Mapping[str, Any]) -> str | None:
    """The state with charts of the perplexities in `result`, None where it has them already."""
    drawn = [] if state is None else [c["uuid"] for c in json.loads(state)["compareRunCharts"]]
    corpora = [name.removeprefix("ppl_") for name in result if name.startswith("ppl_")]
    charts = dict.fromkeys([*drawn, *(f"{y}_{c}" for c in corpora for y in ("ppl", "nll"))])
    return None if len(charts) == len(drawn) else json.dumps(_state(charts))


def _state(measures: Iterable[str]) -> dict[str, Any]:
    """All jobs, sorted by energy, for those sorted by time hang below their sweeps."""
    return {
        "searchFilter": "tags.kind = 'job'",
        "orderByKey": "metrics.`energy_J`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOWALL",
        "selectedColumns": [f"metrics.`{name}`" for name in ("energy_J", *measures)],
        "compareRunSections": [
            {"uuid": SECTION, "name": "Comparison", "display": True, "isReordered": False}
        ],
        "compareRunCharts": [_scatter(name) for name in measures],
    }


def _scatter(measure: str) -> dict[str, Any]:
    return {
        "uuid": measure,
        "type": "SCATTER",
        "metricSectionId": SECTION,
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 1000,
        "xaxis": {"key": "energy_J", "type": "METRIC"},
        "yaxis": {"key": measure, "type": "METRIC"},
    }
