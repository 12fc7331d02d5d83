"""What a run has counted, by role, as the counters of another model's sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate

from pipeline.results.folders import RunFolder
from stages.analysis.rates import SUMS, by_role, of_role
from stages.codings.base import Coding
from stages.errors import InputError
from stages.model.sites import Site
from stages.ports.counters import DECODING


@dataclass(frozen=True)
class Rates:
    """The counts of a run: of every role sums over its sites, means of decoding's costs and of steps."""

    label: str
    coding: Coding
    roles: pd.DataFrame

    @classmethod
    def read(cls, place: str) -> Rates:
        """Those of the folder of a run, or of its result.json.

        Raises InputError where there is no result, or several, or one without spikes.
        """
        path = Path(place).expanduser()
        folder = RunFolder(path.parent if path.is_file() else path)
        jobs = folder.finished if folder.path.is_dir() else []
        if len(jobs) != 1:
            raise InputError(
                f"rates={place}: {len(jobs)} results; give the folder of one job, which has a result.json"
            )
        (job,) = jobs
        coding = instantiate(job.config.coding)
        if not (coding.converts and (coding.neuron or coding.operand_bits)):
            raise InputError(
                f"rates={place}: {job.result['label']} has no spikes and no integers; give another run"
            )
        return cls(
            job.result["label"], coding, by_role(_checked(job.sites, place), f"rates={place}")
        )

    def counters(self, sites: Sequence[Site]) -> pd.DataFrame:
        """A row a site with the counts of its role; InputError for a role that the run does not have."""
        return of_role(self.roles, sites, f"rates: {self.label}")


def _checked(sites: pd.DataFrame, place: str) -> pd.DataFrame:
    lacks = [name for name in (*SUMS, *DECODING) if name not in sites]
    if lacks:
        raise InputError(f"rates={place}: its sites lack {', '.join(lacks)}; run it again")
    return sites
