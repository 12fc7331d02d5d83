"""Which magnitudes a coding's error comes from, in a sweep over the exponent of the level density."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate

from pipeline.figures.levels import artifact, job_config
from stages.analysis.quantiles import error_by_quantile
from stages.codings.base import Coding
from stages.distribution import Densities
from stages.fitted import FittedNeurons

EDGES = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)
CAPTION = (
    "Squared error by quantile of |x|, on the atoms of the calibration text: share: part of a site's "
    "error that lies between the two quantiles, mean over sites; relative: error over power of the "
    "values between them, geometric mean over the sites where it is not zero."
)


def quantile_frame(jobs: Mapping[Path, Mapping[str, Any]]) -> pd.DataFrame:
    """One row a job, by folder, whose coding has an alpha; empty where fewer than two differ."""
    rows = []
    for folder, result in jobs.items():
        config = job_config(folder)
        if "alpha" in config.coding and "fitting" in result["keys"]:
            coding: Coding = instantiate(config.coding, _convert_="all")
            names = {k: result[k] for k in ("transform", "coding", "timesteps")}
            names |= {"alpha": round(float(config.coding.alpha), 3)}
            names |= {k: v for k, v in result.items() if k.startswith("ppl_")}
            densities = Densities.load(artifact(config, result, "distribution"))
            neurons = FittedNeurons.load(artifact(config, result, "fitting"))
            rows.append(names | _error(coding, densities, neurons))
    frame = pd.DataFrame(rows)
    return frame if len(frame) and frame["alpha"].nunique() > 1 else pd.DataFrame()


def _error(coding: Coding, densities: Densities, neurons: FittedNeurons) -> dict[str, float]:
    index = torch.tensor([densities.sites.index(site) for site in neurons.sites])
    found = error_by_quantile(coding, densities.atoms.rows(index), neurons.fit.params, EDGES)
    shares, errors = {}, {}
    for k, (low, high) in enumerate(zip(EDGES[:-1], EDGES[1:], strict=True)):
        share, relative = found.share[:, k], found.relative[:, k]
        some = relative[(relative > 0) & relative.isfinite()]
        shares[f"share_{low:g}_{high:g}"] = float(share.nanmean())
        errors[f"relative_{low:g}_{high:g}"] = float(some.log().mean().exp())
    return shares | errors
