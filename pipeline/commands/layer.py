"""Energy of one linear layer, to check a hardware profile by hand.

`python -m pipeline energy shape=576x1536 profile=lemaire2022 rate=2.0 steps=6`: INPUTSxOUTPUTS, rows=
tokens (1), rate= spikes a value, or dense (with bits= and weight_bits= of integers), steps= timesteps
(6). What its codes cost to decode is not in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd

    from stages.profiles.base import Counts

DEFAULTS = {"shape": "", "rows": "1", "profile": "45nm", "rate": "dense", "steps": "6"}
DEFAULTS |= {"bits": "", "weight_bits": "8"}
SHAPE = re.compile(r"(\d+)x(\d+)")


def report(arguments: Sequence[str], conf: Path) -> None:
    """Print the energy of the layer by part; raises InputError for what cannot be read."""
    from pipeline.run import hardware

    given = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in DEFAULTS or not equals:
            near = nearest(key, DEFAULTS)
            raise InputError(
                f"{argument}: energy of one layer takes {', '.join(DEFAULTS)}{f'; {near}' if near else ''}"
            )
        given[key] = value
    counts, (inputs, outputs) = _counts(given), _shape(given["shape"])
    profile = hardware.profile(given["profile"], conf)
    spent = profile.spent(_work(counts))
    if (joules := spent["J"].sum(skipna=False)) != joules:
        raise InputError(
            f"profile={profile.name} has no energy of a layer that multiplies: give rate=SPIKES"
        )
    print(f"linear {inputs} x {outputs}, {counts.rows:g} rows, {_said(given)}")
    print(f"{profile.name}: {profile.source}\n")
    print(_table(spent), "\n")
    print(f"energy_J {joules:.6g}")


def _counts(given: dict[str, str]) -> Counts:
    """The work of the layer, of a dense or a spiking one."""
    from stages.profiles.base import Counts

    inputs, outputs = _shape(given["shape"])
    rows = _number("rows", given["rows"], 1)
    product = rows * inputs * outputs
    dense = Counts(
        product,
        0.0,
        inputs=rows * inputs,
        outputs=rows * outputs,
        rows=rows,
        weights=inputs * outputs,
        stored=inputs * outputs,
    )
    if given["rate"] == "dense":
        if not given["bits"]:
            return dense
        widths = [float(_number(name, given[name], 1)) for name in ("bits", "weight_bits")]
        return dense._replace(dense=0.0, operand_bits=widths[0], weight_bits=widths[1])
    if given["bits"]:
        raise InputError(
            f"bits={given['bits']} with rate={given['rate']}: integers have rate=dense"
        )
    rate, steps = _rate(given["rate"]), _number("steps", given["steps"], 1)
    spikes = {"acs": product * rate, "spikes": rows * inputs * rate, "entered": product}
    return dense._replace(macs=0.0, dense=0.0, steps=steps, **spikes)


def _work(counts: Counts) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([{"kind": "linear", **counts._asdict()}])


def _table(spent: pd.DataFrame) -> str:
    cells = spent.assign(
        count=spent["count"].map("{:.6g}".format),
        pJ=spent["pJ"].map("{:.6g}".format),
        J=spent["J"].map("{:.6g}".format),
    )
    align = ["left", "left", "right", "right", "right"]
    return str(
        cells.to_markdown(index=False, tablefmt="simple", disable_numparse=True, colalign=align)
    )


def _said(given: dict[str, str]) -> str:
    if given["rate"] != "dense":
        return f"{given['rate']} spikes a value in {given['steps']} steps"
    integers = f" integers of {given['bits']} bits, weights of {given['weight_bits']}"
    return f"dense{integers if given['bits'] else ''}"


def _shape(text: str) -> tuple[int, int]:
    match = SHAPE.fullmatch(text)
    if match is None or not all(map(int, match.groups())):
        raise InputError(f"shape={text}: give INPUTSxOUTPUTS, shape=576x1536")
    return int(match[1]), int(match[2])


def _number(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name}={text}: give a whole number, {least} or more")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 <= rate < math.inf:
        raise InputError(f"rate={text}: give spikes a value, 0 or more, or dense")
    return rate
