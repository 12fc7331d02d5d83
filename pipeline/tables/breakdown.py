"""Tables of a sweep that break the error of its codings down, by role of the site and by quantile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate

from pipeline.results.folders import RunFolder
from pipeline.results.rows import NAMES, result_frame
from pipeline.run.measured import geometric_mean
from stages.analysis.quantiles import error_by_quantile
from stages.codings.base import Coding
from stages.distribution import Densities
from stages.fitted import FittedNeurons
from stages.model.sites import ROLES

ROLES_CAPTION = (
    "nmse by role: geometric mean over its sites, on held-out activations of the dense model."
)
EDGES = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)
QUANTILES_CAPTION = (
    "Squared error by quantile of |x|, on the atoms of the calibration text: share: part of a site's "
    "error that lies between the two quantiles, mean over sites; relative: error over power of the "
    "values between them, geometric mean over the sites where it is not zero."
)


def role_frame(jobs: Mapping[RunFolder, Mapping[str, Any]]) -> pd.DataFrame:
    """One row a converted job: its names, n, T and bits, and an nmse for every role."""
    frame = result_frame(jobs.values())
    names = [c for c in (*NAMES, "grains", "timesteps", "bits") if c in frame]
    rows = []
    for job, (_, row) in zip(jobs, frame.iterrows(), strict=True):
        sites = job.sites.dropna(subset=["nmse"])
        if len(sites):
            means = sites.groupby("role")["nmse"].agg(geometric_mean)
            by_role = {f"nmse_{role}": means.get(role, np.nan) for role in ROLES}
            rows.append({name: row[name] for name in names} | by_role)
    return pd.DataFrame(rows)


def quantile_frame(jobs: Mapping[RunFolder, Mapping[str, Any]]) -> pd.DataFrame:
    """One row a job whose coding has an alpha; empty where fewer than two differ."""
    rows = []
    for job, result in jobs.items():
        if "alpha" in job.config.coding and "fitting" in result["keys"]:
            names = {k: result[k] for k in ("transform", "coding", "timesteps")}
            names |= {"alpha": round(float(job.config.coding.alpha), 3)}
            names |= {k: v for k, v in result.items() if k.startswith("ppl_")}
            rows.append(names | _by_quantile(job))
    frame = pd.DataFrame(rows)
    return frame if len(frame) and frame["alpha"].nunique() > 1 else pd.DataFrame()


def _by_quantile(job: RunFolder) -> dict[str, float]:
    coding: Coding = instantiate(job.config.coding, _convert_="all")
    densities = Densities.load(job.artifact("distribution"))
    neurons = FittedNeurons.load(job.artifact("fitting"))
    index = torch.tensor([densities.sites.index(site) for site in neurons.sites])
    error = error_by_quantile(coding, densities.atoms.rows(index), neurons.fit.params, EDGES)
    shares, errors = {}, {}
    for k, (low, high) in enumerate(zip(EDGES[:-1], EDGES[1:], strict=True)):
        share, relative = error.share[:, k], error.relative[:, k]
        some = relative[(relative > 0) & relative.isfinite()]
        shares[f"share_{low:g}_{high:g}"] = float(share.nanmean())
        errors[f"relative_{low:g}_{high:g}"] = float(some.log().mean().exp())
    return shares | errors
