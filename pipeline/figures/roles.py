"""The error of every run of a sweep by the role of the site: where a coding gains and where not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.figures.figures import ROLES
from pipeline.results.rows import NAMES, result_frame
from pipeline.run.measured import geometric_mean

CAPTION = "nmse by role: geometric mean over its sites, on held-out activations of the dense model."


def role_frame(jobs: Mapping[Path, Mapping[str, Any]]) -> pd.DataFrame:
    """One row a converted job, by folder: its names, n, T and bits, and an nmse for every role."""
    frame = result_frame(jobs.values())
    names = [c for c in (*NAMES, "grains", "timesteps", "bits") if c in frame]
    rows = []
    for (folder, _), (_, row) in zip(jobs.items(), frame.iterrows(), strict=True):
        sites = pd.read_parquet(folder / "per_site.parquet").dropna(subset=["nmse"])
        if len(sites):
            means = sites.groupby("role")["nmse"].agg(geometric_mean)
            by_role = {f"nmse_{role}": means.get(role, np.nan) for role in ROLES}
            rows.append({name: row[name] for name in names} | by_role)
    return pd.DataFrame(rows)
