"""Spikes and decoding of every operand of a model, from what its sites have counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.codings.base import Coding
from stages.errors import InputError
from stages.model.sites import Site, pooled
from stages.ports.counters import DECODING

if TYPE_CHECKING:
    import pandas as pd

SUMS = ("values", "spikes", "macs", "acs")


@dataclass(frozen=True)
class Rate:
    """Spikes of a coded operand: per value, and per multiplication (weighted by fan-out), both zero where
    its values are integers; `dense` is the part of its values that has no neuron, those of experts left
    dense. What decoding costs: `macs`, `acs` of an accumulator and `comparisons` of a value; `steps`
    until the last spike."""

    value: float
    product: float
    dense: float = 0.0
    macs: float = 0.0
    acs: float = 0.0
    comparisons: float = 0.0
    steps: float = 0.0


def rates(counters: pd.DataFrame | None, coding: Coding | None) -> dict[str, Rate | None]:
    """The rate of every operand; None where it is dense, NaN where it has no spikes to count.

    `counters` are those of an evaluation, one row a site, with the columns DECODING.
    """
    if counters is None:
        return {}
    if coding is None:
        if counters["spikes"].notna().any():
            raise ValueError("spikes were counted, but no coding is given")
        return {}
    integer = coding.operand_bits is not None
    if not (coding.neuron or integer):
        return {pooled(str(site)): Rate(math.nan, math.nan) for site in counters["site"]}
    table = _pooled(counters, integer)
    found: dict[str, Rate | None] = {str(site): None for site in table.index}
    coded = table[table["coded"] > 0]
    value, product = coded["spikes"] / coded["values"], coded["acs"] / coded["macs"]
    dense = 1 - coded["coded"] / coded["values"]
    decoding = coded[[*DECODING]].div(coded["coded"], axis=0).assign(steps=coded["steps"])
    rows = zip(coded.index, value, product, dense, *decoding.to_numpy().T, strict=True)
    return found | {str(site): Rate(*map(float, costs)) for site, *costs in rows}


def _pooled(counters: pd.DataFrame, integer: bool) -> pd.DataFrame:
    """Sums by operand, as what all experts of a layer counted; `coded` of the values have a neuron, and
    what decoding costs is summed over these; `steps` of the longest."""
    costs = counters.reindex(columns=[*DECODING])
    if integer:  # no spikes: what is coded has something to decode
        counters = counters.assign(spikes=0.0, acs=0.0)
        has = costs["decode_macs"].notna()
        costs = costs.assign(steps=costs["steps"].where(~has, 0.0))
    else:
        has = counters["spikes"].notna()
    if costs.isna().any(axis=1)[has].any():
        raise ValueError(f"counters of coded sites without {', '.join(DECODING)}")
    coded = counters["values"].where(has, 0.0)
    summed = costs.drop(columns="steps").mul(coded, axis=0)
    table = counters.assign(**summed, steps=costs["steps"], coded=coded)
    table["site"] = counters["site"].map(pooled)
    groups = table.groupby("site", sort=False)
    names = ["values", "spikes", "macs", "acs", "coded", *summed]
    return groups[names].sum(min_count=1).assign(steps=groups["steps"].max())


def by_role(counters: pd.DataFrame, whose: str) -> pd.DataFrame:
    """The counters of a model summed over the sites of a role: sums of counts, means by values of what
    decoding costs and of steps. InputError where only some sites of a role are coded."""
    part = counters.groupby("role")["decode_macs"].agg(["count", "size"]).query("0 < count < size")
    if len(part):
        raise InputError(
            f"{whose}: only some sites of {', '.join(part.index)} are coded; give a run without "
            "sites.exclude"
        )
    costs = counters[[*DECODING]].mul(counters["values"], axis=0)
    sums = counters.assign(**costs).groupby("role")[[*SUMS, *DECODING]].sum(min_count=1)
    sums[[*DECODING]] = sums[[*DECODING]].div(sums["values"], axis=0)
    return sums


def of_role(roles: pd.DataFrame, sites: Sequence[Site], whose: str) -> pd.DataFrame:
    """Counters of another model's sites, each as its role of `by_role`; InputError for one without any."""
    absent = sorted({site.role for site in sites} - set(roles.index))
    if absent:
        raise InputError(f"{whose} has no site of role {', '.join(absent)}")
    rows = roles.loc[[site.role for site in sites]].reset_index(drop=True)
    rows.insert(0, "site", [site.name for site in sites])
    return rows
