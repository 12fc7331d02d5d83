"""What a spiking model saves against a dense one under a hardware profile, and from which rate on."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from stages.profiles.base import Profile

if TYPE_CHECKING:
    import pandas as pd

MOST = 1000  # times the rate: no code has more


def against(
    part: pd.DataFrame, dense: pd.DataFrame, profiles: Mapping[str, Profile]
) -> dict[str, float | None]:
    """Energy, saving and break-even of work against that of a dense model: saving of the first profile,
    energy_J_<name>, saving_<name> and breakeven_<name> of all; None or NaN where undefined."""
    columns: dict[str, float | None] = {}
    for name, profile in profiles.items():
        ours, theirs = (profile.joules(each) for each in (part, dense))
        saved = 1 - ours / theirs if theirs else math.nan
        columns.setdefault("saving", saved)
        columns |= {f"energy_J_{name}": ours, f"saving_{name}": saved}
        columns[f"breakeven_{name}"] = break_even(part, theirs, profile)
    return columns


def break_even(part: pd.DataFrame, dense: float, profile: Profile) -> float | None:
    """Spikes a value at which the energy is `dense` joules, with all rates changed by one factor.

    0 where silence costs no less; None without spikes, or where no rate costs as much.
    """
    spikes, entered = part["acs"].where(part["entered"] > 0, 0.0).sum(), part["entered"].sum()
    if not (spikes > 0 and dense > 0):
        return None

    @functools.cache  # the search asks again for its ends
    def excess(factor: float) -> float:
        fired = part["entered"] > 0
        scaled = {name: part[name] * np.where(fired, factor, 1.0) for name in ("acs", "spikes")}
        return profile.joules(part.assign(**scaled)) / dense - 1

    from scipy.optimize import brentq  # which a configuration is read without

    silent, now = excess(0.0), excess(1.0)
    if not now > silent:
        return None
    if silent >= 0:
        return 0.0
    most = 1.0
    while excess(most) < 0:
        if most > MOST:
            return None
        most *= 2
    return float(brentq(excess, 0.0, most, xtol=1e-12) * spikes / entered)
