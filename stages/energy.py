"""Energy: arithmetic on the operations of a model and the spikes that were counted at its sites.

Biases, an addition an accumulator, are not counted; the product of a linear layer's weights with the means
that its inputs are coded about is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.analysis.operations import ELEMENTWISE, PRODUCTS, ROTATION, Operation, pairs_met
from stages.codings.base import Coding
from stages.errors import InputError
from stages.model.sites import pooled

if TYPE_CHECKING:
    import pandas as pd

ATTENTION = ("full", "causal")
OPERANDS = ("one", "both")
WEIGHED = (*ELEMENTWISE, *ROTATION)  # kinds whose amounts a convention turns into work
KINDS = (*PRODUCTS, "decode_scaling", "gate", *WEIGHED)
DECODING = ("decode_macs", "decode_acs", "comparisons")  # columns of what the code itself costs
COSTS = {"macs": "macs_G", "acs": "acs_G", "energy_J": "energy_J"}


@dataclass(frozen=True)
class HardwareProfile:
    """What a multiply-accumulate and an accumulate cost, in picojoules."""

    name: str
    mac_pj: float
    ac_pj: float

    def __post_init__(self) -> None:
        for field in ("mac_pj", "ac_pj"):
            value = getattr(self, field)
            if not math.isfinite(value) or value < 0:
                raise InputError(f"energy.profile.{field}={value!r}: give picojoules, 0 or more")


@dataclass(frozen=True)
class Convention:
    """What counts as work.

    `attention`: every query meets every key (full) or those it sees (causal). `operands`: spikes of
    one or of both operands of an attention product. `macs`, `acs`: per element of every
    element-wise kind, per addition of a `hadamard` and per multiplication of a `mixing`.
    `decode_scaling`, `gate_comparisons`: whether the work of the code itself counts.
    """

    attention: str
    operands: str
    macs: Mapping[str, float]
    acs: Mapping[str, float]
    decode_scaling: bool
    gate_comparisons: bool

    def __post_init__(self) -> None:
        for field, allowed in (("attention", ATTENTION), ("operands", OPERANDS)):
            if (value := getattr(self, field)) not in allowed:
                raise InputError(
                    f"energy convention: {field}={value!r}: choose {' or '.join(allowed)}"
                )
        for field in ("macs", "acs"):
            costs = getattr(self, field)
            if set(costs) != set(WEIGHED) or not all(c >= 0 for c in costs.values()):
                raise InputError(
                    f"energy convention: {field}={dict(costs)}: give a number, 0 or more, for each "
                    f"of {', '.join(WEIGHED)}"
                )


@dataclass(frozen=True)
class Energy:
    """The energy stage: length of the prompt (None: the caller's choice), hardware, conventions."""

    tokens: int | None
    profile: HardwareProfile
    conventions: Mapping[str, Convention]

    def __post_init__(self) -> None:
        if self.tokens is not None:
            _check_tokens(self.tokens)
        if not self.conventions:
            raise InputError("energy.conventions is empty: give at least one")
        for name, convention in self.conventions.items():
            if not isinstance(convention, Convention):
                raise InputError(f"energy.conventions.{name}={convention!r} is no Convention")


@dataclass(frozen=True)
class Rate:
    """Spikes of a coded operand: per value, and per multiplication (weighted by fan-out); `dense` is
    the part of its values that has no neuron, those of experts left dense. What decoding costs:
    `macs`, `acs` of an accumulator and `comparisons` of a value."""

    value: float
    product: float
    dense: float = 0.0
    macs: float = 0.0
    acs: float = 0.0
    comparisons: float = 0.0


def account(
    plan: Sequence[Operation],
    energy: Energy,
    tokens: int,
    counters: pd.DataFrame | None = None,
    coding: Coding | None = None,
) -> pd.DataFrame:
    """Compute MACs, ACs and joules of every operation, for a prompt of `tokens` and for one more token.

    `counters` are those of the evaluation, one row a site, with the columns DECODING; without them the
    model is dense. Their rates, measured on whole windows, hold for prefill and for decode. The
    decoded token is the last of a context of `tokens`. Columns: convention phase op kind layer macs
    acs energy_J. Products of integers stay MACs; those of a bound, a coding without spikes, are
    undefined (NaN).
    """
    import pandas as pd

    _check_tokens(tokens)
    rates = _rates(counters, coding)
    rows = [
        (name, phase, *row)
        for name, convention in energy.conventions.items()
        for phase, queries in (("prefill", tokens), ("decode", 1))
        for operation in plan
        for row in _rows(operation, convention, rates, coding, queries, tokens)
    ]
    columns = ["convention", "phase", "op", "kind", "layer", "macs", "acs"]
    frame = pd.DataFrame(rows, columns=columns).astype({"macs": float, "acs": float})
    picojoules = frame["macs"] * energy.profile.mac_pj + frame["acs"] * energy.profile.ac_pj
    return frame.assign(energy_J=picojoules * 1e-12)


def _rows(
    operation: Operation,
    convention: Convention,
    rates: Mapping[str, Rate | None],
    coding: Coding | None,
    queries: int,
    context: int,
) -> Iterator[tuple[str, str, int, float, float]]:
    """The costs (op, kind, layer, macs, acs) of one operation, and of the code of its operands."""
    name, kind, layer = operation.name, operation.kind, operation.layer
    pairs = pairs_met(queries, context, convention.attention, operation.window, operation.prefix)
    work = operation.work.at(queries, pairs)
    coded = [rate for site in operation.operands if rates and (rate := rates[site]) is not None]
    if kind in WEIGHED:
        yield name, kind, layer, work * convention.macs[kind], work * convention.acs[kind]
    elif kind == "gate":
        if coded and coded[0].comparisons and convention.gate_comparisons:
            coded_part = 1 - coded[0].dense
            yield name, kind, layer, 0.0, work * coded_part * coded[0].comparisons
        if coding and coded and coding.value_macs and convention.decode_scaling:
            # Of values that have channels: probabilities, which come by pairs, have none.
            scaled = operation.work.per_token * queries * (1 - coded[0].dense) * coding.value_macs
            yield name, "decode_scaling", layer, scaled, 0.0
    elif not coded:
        yield name, kind, layer, work, 0.0
    else:
        assert coding is not None
        used = coded if convention.operands == "both" else coded[:1]
        # Of the full square every value meets as many others: the fan-out has no weight in it.
        spikes = sum(r.value if convention.attention == "full" else r.product for r in used)
        stays = work * math.prod(rate.dense for rate in used)
        yield name, kind, layer, math.nan if math.isnan(spikes) else stays, work * spikes
        macs = sum((1 - rate.dense) * rate.macs for rate in used)
        acs = sum((1 - rate.dense) * rate.acs for rate in used)
        if convention.decode_scaling and (macs or acs):
            outputs = operation.outputs.at(queries, pairs)
            yield name, "decode_scaling", layer, outputs * macs, outputs * acs


def by_kind(frame: pd.DataFrame) -> pd.DataFrame:
    """Sum up every kind of operation: convention phase kind count and costs."""
    keys = ["convention", "phase", "kind"]
    groups = frame.groupby(keys, sort=False)
    table = _giga(groups[list(COSTS)].sum(skipna=False))
    table.insert(0, "count", groups.size())
    order = {kind: index for index, kind in enumerate(KINDS)}
    table = table.reset_index()
    # A stable sort of the kinds inside each group keeps the order of conventions and phases.
    rank = table.groupby(keys[:2], sort=False).ngroup() * len(KINDS) + table["kind"].map(order)
    return table.iloc[rank.argsort(kind="stable")].reset_index(drop=True)


def summary(frame: pd.DataFrame) -> dict[str, dict[str, dict[str, float | None]]]:
    """Sum up a frame as {convention: {phase: {macs_G, acs_G, energy_J}}}; None where undefined."""
    keys = ["convention", "phase"]
    totals = _giga(frame.groupby(keys, sort=False)[list(COSTS)].sum(skipna=False))
    result: dict[str, dict[str, dict[str, float | None]]] = {}
    for row in totals.reset_index().to_dict("records"):
        costs = {name: None if math.isnan(row[name]) else row[name] for name in COSTS.values()}
        result.setdefault(row["convention"], {})[row["phase"]] = costs
    return result


def saving(spiking: pd.DataFrame, dense: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    """Compute the part of dense energy that is saved: {convention: {phase: part}}; None if undefined."""
    theirs = summary(dense)
    return {
        convention: {
            phase: _saved(costs["energy_J"], theirs[convention][phase]["energy_J"])
            for phase, costs in phases.items()
        }
        for convention, phases in summary(spiking).items()
    }


def _saved(spiking: float | None, dense: float | None) -> float | None:
    return None if spiking is None or not dense else 1 - spiking / dense


def _giga(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(macs=table["macs"] / 1e9, acs=table["acs"] / 1e9).rename(columns=COSTS)


def _check_tokens(tokens: int) -> None:
    if not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"energy.tokens={tokens!r}: give a whole number of tokens, at least 1")


def _rates(counters: pd.DataFrame | None, coding: Coding | None) -> dict[str, Rate | None]:
    """The rate of every site; None where the site is dense, NaN where it has no spikes to count;
    none at all where products multiply numbers, those of the dense model or integers."""
    if counters is None:
        return {}
    table = _pooled(counters)
    if coding is None:
        if table["spikes"].notna().any():
            raise ValueError("spikes were counted, but no coding is given")
        return {}
    if coding.operand_bits is not None:
        return {}
    if not coding.neuron:
        return {str(site): Rate(math.nan, math.nan) for site in table.index}
    rates = {str(site): None for site in table.index}
    coded = table[table["spikes"].notna()]
    value, product = coded["spikes"] / coded["values"], coded["acs"] / coded["macs"]
    dense = 1 - coded["coded"] / coded["values"]
    decoding = coded[[*DECODING]].div(coded["coded"], axis=0).to_numpy()
    rows = zip(coded.index, value, product, dense, *decoding.T, strict=True)
    return rates | {str(site): Rate(*map(float, costs)) for site, *costs in rows}


def _pooled(counters: pd.DataFrame) -> pd.DataFrame:
    """Sums by operand, as what all experts of a layer counted; `coded` of the values have a neuron, and
    what decoding costs is summed over these."""
    coded = counters["values"].where(counters["spikes"].notna(), 0.0)
    costs = counters.reindex(columns=[*DECODING])
    if costs.isna().any(axis=1)[counters["spikes"].notna()].any():
        raise ValueError(f"counters of coded sites without {', '.join(DECODING)}")
    table = counters.assign(**costs.mul(coded, axis=0), coded=coded)
    table["site"] = counters["site"].map(pooled)
    summed = ["values", "spikes", "macs", "acs", "coded", *DECODING]
    return table.groupby("site", sort=False)[summed].sum(min_count=1)
