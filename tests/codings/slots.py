"""The levels of a time code, laid out gap by gap, for one value and for arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np

from stages.codings.timed import Timed


def slots_of(coding: Timed, p: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Levels as they are decoded and thresholds in units of the scale, both ascending: those of the
    parameters, or gap by gap from the base of every segment to its end."""
    if coding.levels == "free":
        used = np.isfinite(p["thresholds"])
        return p["levels"][1:][used], p["thresholds"][used]
    levels, thresholds = [], []
    for start, base, gap, end in zip(*(p[n] for n in ("start", "base", "gap", "end")), strict=True):
        place = float(base)
        while np.isfinite(start) and place < end:
            thresholds.append(float(start) if place == base else place + float(gap) / 2)
            place += float(gap)
            levels.append(place)
    return np.float32(levels) * p["scale"], np.float32(thresholds)


def slotted(coding: Timed, p: dict[str, np.ndarray], loop: Callable[..., Any]) -> Any:
    """The neuron whose threshold falls by `loop`; its code numbers the levels from the lowest on."""
    levels, thresholds = slots_of(coding, p)
    first = loop(np.concatenate([np.zeros(1, np.float32), levels]), thresholds)
    scale = p.get("scale", np.float32(1))[()]

    def neuron(x: Any) -> tuple[Any, Any, Any]:
        time, value, count = first(x / scale)
        return len(thresholds) - time, value, count

    return neuron
