"""How Algorithm 1 converges in a sweep over the surrogate's slope: one table and one figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from omegaconf import DictConfig, OmegaConf

from pipeline.figures.style import BARS, ROLES, STYLE, WIDTH, entry
from pipeline.results.folders import RunFolder
from stages.analysis.convergence import fit_decay
from stages.fitted import FittedNeurons

COLUMNS = ("rho", "C", "C_relative", "last_relative", "R2")
# What the figure shows: the label of its axis, and the title.
PANELS = {
    "C_relative": ("C / first loss", "What the loss settles at"),
    "rho": ("ρ per step", "Rate"),
}
QUARTILES = {"_low": 0.25, "_high": 0.75}
ENDS = [f"{kind}{end}" for kind in PANELS for end in QUARTILES]
SETTLED = 0.1  # of the falling term may be left at the end of a curve that has settled


def convergence_frame(jobs: Mapping[RunFolder, Mapping[str, Any]]) -> pd.DataFrame:
    """Medians over the sites of a role of rho, C, C / first loss and R^2, by role and slope.

    Of the jobs those that differ from another one in the slope alone; empty without.
    `sites` counts the curves, `fell` those with a term that falls (others have no rho), `settled`
    those of them where it is nearly gone at the end: C of the others is an extrapolation.
    """
    groups: dict[str, dict[float, pd.DataFrame]] = {}
    for job, result in jobs.items():
        if "fitting" not in result.get("keys", {}):
            continue
        config = job.config
        neurons = FittedNeurons.load(job.artifact("fitting"))
        if neurons.fit.curve is not None:
            slopes = groups.setdefault(_all_but_slope(config, result), {})
            slopes.setdefault(float(config.coding.algorithm1.slope), _fits(neurons))
    parts = [
        by_role(fits).assign(row=result_name, slope=slope)
        for result_name, slopes in _named(groups).items()
        for slope, fits in sorted(slopes.items())
    ]
    if not parts:
        return pd.DataFrame()
    frame = pd.concat(parts)
    roles = frame["role"].map(list(ROLES).index)
    frame = frame.assign(order=roles).sort_values(["row", "order", "slope"], kind="stable")
    several = ["row"] if frame["row"].nunique() > 1 else []
    return frame[
        [*several, "role", "slope", "sites", "fell", "settled", *COLUMNS, *ENDS]
    ].reset_index(drop=True)


def _all_but_slope(config: DictConfig, result: Mapping[str, Any]) -> str:
    """What determines a fit, its slope left out, as text."""
    parts: dict[str, Any] = {
        name: OmegaConf.to_container(config[name], resolve=True) for name in ("coding", "fitting")
    }
    del parts["coding"]["algorithm1"]["slope"]
    return json.dumps(parts | {"distribution": result["keys"]["distribution"]}, sort_keys=True)


def _named(
    groups: Mapping[str, dict[float, pd.DataFrame]],
) -> dict[str, dict[float, pd.DataFrame]]:
    """The groups of several slopes, by coding with T and n and numbered where that is not enough."""
    named: dict[str, dict[float, pd.DataFrame]] = {}
    for text, slopes in groups.items():
        if len(slopes) > 1:
            coding = json.loads(text)["coding"]
            name = f"{coding['name']} T={coding['timesteps']} n={coding['grains']}"
            again = sum(other.startswith(name) for other in named)
            named[f"{name} #{again + 1}" if again else name] = slopes
    return named


def _fits(neurons: FittedNeurons) -> pd.DataFrame:
    """rho, C, C / first loss, last loss / first loss and R^2 of every site, and whether it settled."""
    curve = neurons.fit.curve
    assert curve is not None
    decay, first = fit_decay(curve), curve[:, 0].double()
    return pd.DataFrame(
        {
            "role": neurons.roles,
            "rho": decay.rate.numpy(),
            "C": decay.limit.numpy(),
            "C_relative": (decay.limit / first).numpy(),
            "last_relative": (curve[:, -1] / first).numpy(),
            "R2": decay.r2.numpy(),
            "settled": (decay.rate ** (curve.shape[1] - 1) < SETTLED).numpy(),
        }
    )


def by_role(fits: pd.DataFrame) -> pd.DataFrame:
    """The median of every column over the sites of a role, undefined values left out; of those that
    the figure shows also the quartiles."""
    groups = fits.groupby("role", sort=False)
    frame = groups[list(COLUMNS)].median()
    for end, part in QUARTILES.items():
        quartiles = groups[list(PANELS)].quantile(part)
        frame[[f"{kind}{end}" for kind in PANELS]] = quartiles
    frame.insert(0, "sites", groups.size())
    frame.insert(1, "fell", groups["rho"].count())
    frame.insert(2, "settled", groups["settled"].sum())
    return frame.reset_index()


def caption(frame: pd.DataFrame) -> str:
    """What the columns are, and in how many roles C is smaller under the steepest surrogate."""
    low, high = frame["slope"].min(), frame["slope"].max()
    keys = [name for name in ("row", "role") if name in frame]
    shrunk = {}
    for value in ("C", "last_relative"):
        wide = frame.pivot(index=keys, columns="slope", values=value)
        shrunk[value] = f"{int((wide[high] < wide[low]).sum())} of {len(wide)} rows"
    return (
        "Loss curves of Algorithm 1 as C + a rho^k, k counting Adam steps: medians over the sites of "
        "a role; fell: sites whose curve has a falling term, the others have no rho; settled: sites "
        f"where less than {SETTLED:g} of that term is left at the end, C of the others is an "
        "extrapolation; C_relative, last_relative: C and the last loss / the first loss. A steeper "
        f"surrogate smooths less: from slope {low:g} to {high:g} C shrinks in {shrunk['C']}, the last "
        f"loss in {shrunk['last_relative']}."
    )


@rc_context(STYLE)
def limit_by_slope(frame: pd.DataFrame) -> Figure:
    """C / first loss and the rate rho against the surrogate's slope, a line a role with the quartiles of
    its sites."""
    if "row" in frame:
        frame = frame[frame["row"] == frame["row"].iloc[0]]
    kinds = [kind for kind in PANELS if frame[kind].notna().any()]
    figure = Figure(figsize=(WIDTH, 3.2))
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    handles = []
    for role, rows in frame.dropna(subset=kinds, how="all").groupby("role", sort=False):
        colour, marker = ROLES[str(role)]
        dashes = "--" if str(role).startswith("mlp.") else "-"
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dashes}
        for axes, kind in zip(panels, kinds, strict=True):
            bars = [rows[kind] - rows[f"{kind}_low"], rows[f"{kind}_high"] - rows[kind]]
            axes.plot(rows["slope"], rows[kind], **look, label=role)
            axes.errorbar(rows["slope"], rows[kind], bars, fmt="none", ecolor=colour, **BARS)
        handles.append(entry(str(role), **look))
    slopes = sorted(frame["slope"].unique())
    for axes, kind in zip(panels, kinds, strict=True):
        axes.set(xscale="log", xlabel="slope of the surrogate")
        axes.set_xticks(slopes, [f"{slope:g}" for slope in slopes])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(ylabel=PANELS[kind][0], title=PANELS[kind][1])
    figure.legend(handles=handles, loc="outside right center", handlelength=3)
    return figure
