"""Energy: arithmetic on the operations of a model and the spikes that were counted at its sites.

What an operation does is counted once (`account`); every hardware profile prices the same counts
(`spent`).

Biases, an addition an accumulator, are not counted; the product of a linear layer's weights with the means
that its inputs are coded about is one of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.analysis.operations import (
    ELEMENTWISE,
    PRODUCTS,
    ROTATION,
    Operation,
    keys_met,
    operations,
    pairs_met,
    untransformed,
)
from stages.analysis.rates import Rate, of_role, rates
from stages.codings.base import Coding
from stages.errors import InputError
from stages.model.sites import find_sites
from stages.profiles.base import Counts, Profile
from stages.profiles.break_even import against

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

ATTENTION = ("full", "causal")
OPERANDS = ("one", "both")
WEIGHED = (*ELEMENTWISE, *ROTATION)  # kinds whose amounts a convention turns into work
KINDS = (*PRODUCTS, "decode_scaling", "gate", *WEIGHED)
NUMBER = re.compile(r"\.\d+(?=[.:]|$)")  # of a layer in the name of an operation
COSTS = {"macs": "macs_G", "acs": "acs_G", "energy_J": "energy_J"}


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
    """The energy stage: length of the prompt (None: the caller's choice), hardware, conventions.

    `models` are names of further models whose dimensions are known: what one of them would cost with the
    rates that were counted at sites of the same role. The first hardware profile is that of the joules
    that no name of a profile stands beside.
    """

    tokens: int | None
    profile: Mapping[str, Profile]
    conventions: Mapping[str, Convention]
    models: Sequence[str] = ()

    @property
    def main(self) -> Profile:
        """The first hardware profile."""
        return next(iter(self.profile.values()))

    @property
    def profiles(self) -> dict[str, Profile]:
        """The hardware profiles by their names."""
        return {each.name: each for each in self.profile.values()}

    def __post_init__(self) -> None:
        if self.tokens is not None:
            _check_tokens(self.tokens)
        for field in ("profile", "conventions"):
            if not getattr(self, field):
                raise InputError(f"energy.{field} is empty: give at least one")
        for name, profile in self.profile.items():
            if not isinstance(profile, Profile):
                raise InputError(f"energy.profile.{name}={profile!r} is no hardware profile")
        if len(self.profiles) < len(self.profile):
            names = ", ".join(each.name for each in self.profile.values())
            raise InputError(f"energy.profile: two have one name: {names}")
        for name, convention in self.conventions.items():
            if not isinstance(convention, Convention):
                raise InputError(f"energy.conventions.{name}={convention!r} is no Convention")


def account(
    plan: Sequence[Operation],
    energy: Energy,
    tokens: int,
    counters: pd.DataFrame | None = None,
    coding: Coding | None = None,
) -> pd.DataFrame:
    """Count the work of every operation, for a prompt of `tokens` and for one more token.

    `counters` are those of the evaluation, one row a site, with the columns DECODING; without them the
    model is dense. Their rates, measured on whole windows, hold for prefill and for decode. The
    decoded token is the last of a context of `tokens`. Columns: convention phase op kind layer, those of
    `Counts`, energy_J of the first profile. Products of integers stay MACs; those of a bound, a coding
    without spikes, are undefined (NaN).
    """
    import pandas as pd

    _check_tokens(tokens)
    found = rates(counters, coding)
    rows = [
        (name, phase, *labels, *counts)
        for name, convention in energy.conventions.items()
        for phase, queries in (("prefill", tokens), ("decode", 1))
        for operation in plan
        for *labels, counts in _rows(operation, convention, found, coding, queries, tokens)
    ]
    columns = ["convention", "phase", "op", "kind", "layer", *Counts._fields]
    frame = pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(Counts._fields, float))
    spent = energy.main.spent(frame)["J"].groupby(level=0)
    return frame.assign(energy_J=spent.sum(skipna=False).reindex(frame.index, fill_value=0.0))


def _rows(
    operation: Operation,
    convention: Convention,
    rates: Mapping[str, Rate | None],
    coding: Coding | None,
    queries: int,
    context: int,
) -> Iterator[tuple[str, str, int, Counts]]:
    """The counts (op, kind, layer, counts) of one operation, and of the code of its operands."""
    name, kind, layer = operation.name, operation.kind, operation.layer
    seen = (convention.attention, operation.window, operation.prefix)
    pairs = pairs_met(queries, context, *seen)
    work = operation.work.at(queries, pairs)
    known = {site: rates[site] for site in operation.operands if rates}
    coded = {site: rate for site, rate in known.items() if rate is not None}
    if kind in WEIGHED:
        counts = Counts(work * convention.macs[kind], work * convention.acs[kind], rows=queries)
        yield name, kind, layer, counts
        return
    if kind == "gate":
        for rate in coded.values():
            if rate.comparisons and convention.gate_comparisons:
                compared = work * (1 - rate.dense) * rate.comparisons
                yield name, kind, layer, Counts(0.0, compared, rows=queries)
            if coding and coding.value_macs and convention.decode_scaling:
                # Of values that have channels: probabilities, which come by pairs, have none.
                scaled = operation.work.per_token * queries * (1 - rate.dense) * coding.value_macs
                yield name, "decode_scaling", layer, Counts(scaled, 0.0, rows=queries)
        return
    if kind == "linear":
        stored = operation.stored
        weights = min(stored, operation.weights * queries)
    else:
        weights = stored = operation.cached * keys_met(queries, context, *seen)
    outputs = operation.outputs.at(queries, pairs)
    inputs = operation.inputs.at(queries, pairs)
    dense = Counts(
        work,
        0.0,
        inputs=inputs,
        outputs=outputs,
        rows=queries,
        weights=weights,
        stored=stored,
        cached=operation.cached * queries,
    )
    if not coded:
        yield name, kind, layer, dense
        return
    assert coding is not None
    used = dict([*coded.items()][: len(coded) if convention.operands == "both" else 1])
    yield name, kind, layer, _coded(dense, operation, convention, used, coding)
    macs = sum((1 - rate.dense) * rate.macs for rate in used.values())
    acs = sum((1 - rate.dense) * rate.acs for rate in used.values())
    if convention.decode_scaling and (macs or acs):
        counts = Counts(outputs * macs, outputs * acs, outputs=outputs, rows=queries)
        yield name, "decode_scaling", layer, counts


def _coded(
    dense: Counts,
    operation: Operation,
    convention: Convention,
    used: Mapping[str, Rate],
    coding: Coding,
) -> Counts:
    """The counts of a product of which the operands `used` are coded, from those of the dense one."""
    stays = math.prod(rate.dense for rate in used.values())
    if coding.operand_bits is not None:
        if len(used) < len(operation.operands) and convention.operands == "both":
            return dense  # an integer times a float
        other = coding.weight_bits if operation.kind == "linear" else coding.operand_bits
        bits = {"operand_bits": float(coding.operand_bits), "weight_bits": float(other or math.nan)}
        return dense._replace(dense=stays, **bits)
    # Of the full square every value meets as many others: the fan-out has no weight in it.
    full = convention.attention == "full"
    spikes = sum(rate.value if full else rate.product for rate in used.values())
    values = dict(zip(operation.operands, (dense.inputs, dense.weights), strict=False))
    return dense._replace(
        macs=math.nan if math.isnan(spikes) else dense.macs * stays,
        acs=dense.macs * spikes,
        dense=stays,
        # the spikes of keys and values are read out of the cache
        spikes=sum(values[site] * rate.value for site, rate in used.items()),
        entered=dense.macs * sum(1 - rate.dense for rate in used.values()),
        steps=max(rate.steps for rate in used.values()),
    )


def spent(frame: pd.DataFrame, energy: Energy) -> pd.DataFrame:
    """What every operation of an account costs under every profile, part by part: columns convention
    phase op kind layer profile part event count pJ J."""
    import pandas as pd

    names = ["convention", "phase", "op", "kind", "layer"]
    tables = [
        frame[names].join(profile.spent(frame), how="inner").assign(profile=name)
        for name, profile in energy.profiles.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[[*names, "profile", "part", "event", "count", "pJ", "J"]]


def by_part(table: pd.DataFrame) -> pd.DataFrame:
    """Sum up `spent` over the layers: convention phase profile op part event count pJ J, where `op` has a
    star for the number of the layer and pJ is the mean price of an event."""
    ops = table["op"].str.replace(NUMBER, ".*", regex=True)
    keys = ["convention", "phase", "profile", "op", "part", "event"]
    sums = table.assign(op=ops).groupby(keys, sort=False)[["count", "J"]]
    total = sums.sum(min_count=1).reset_index()
    total.insert(len(keys) + 1, "pJ", total["J"] / total["count"] * 1e12)
    return total


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
    """Sum up an account as {convention: {phase: {macs_G, acs_G, energy_J}}}; None where undefined."""
    keys = ["convention", "phase"]
    totals = _giga(frame.groupby(keys, sort=False)[list(COSTS)].sum(skipna=False))
    result: dict[str, dict[str, dict[str, float | None]]] = {}
    for row in totals.reset_index().to_dict("records"):
        costs = {name: _known(row[name]) for name in COSTS.values()}
        result.setdefault(row["convention"], {})[row["phase"]] = costs
    return result


def compared(
    frame: pd.DataFrame, dense: pd.DataFrame, energy: Energy
) -> dict[str, dict[str, dict[str, float | None]]]:
    """The summary of an account with what it saves against that of the dense model.

    Beside the columns of `summary` there are saving, the part of the dense model's energy that is saved,
    and of every profile energy_J_<name>, saving_<name> and breakeven_<name>: the spikes a value at which
    both energies are equal, 0 where a silent model costs no less than the dense one. None where
    something is undefined: without spikes, or where a profile has no energy of the dense model.
    """
    result = summary(frame)
    for convention, phases in result.items():
        for phase, costs in phases.items():
            ours, theirs = (
                each[(each["convention"] == convention) & (each["phase"] == phase)]
                for each in (frame, dense)
            )
            found = against(ours, theirs, energy.profiles)
            costs |= {name: _known(value) for name, value in found.items()}
    return result


def of_model(
    model: PreTrainedModel, energy: Energy, counters: pd.DataFrame | None, coding: Coding
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The account of a model, and its comparison with the dense model before its transform.

    `counters` are by site or, of another model, `by_role`; None for the dense model.
    """
    assert energy.tokens is not None
    sites = find_sites(model)
    plan = operations(model, sites)
    dense = account(untransformed(plan), energy, energy.tokens)
    if counters is None:
        frame = account(plan, energy, energy.tokens)
    else:
        rows = counters if "site" in counters else of_role(counters, sites, "the counted model")
        frame = account(plan, energy, energy.tokens, rows, coding)
    return frame, dict(compared(frame, dense, energy))


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _giga(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(macs=table["macs"] / 1e9, acs=table["acs"] / 1e9).rename(columns=COSTS)


def _check_tokens(tokens: int) -> None:
    if not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"energy.tokens={tokens!r}: give a whole number of tokens, at least 1")
