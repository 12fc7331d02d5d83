"""Every neuron one value and one step at a time in float32, written from its equations.

They are the definitions that the neurons of `reference.py`, which run on whole arrays, are held to.
"""

from collections.abc import Callable

import numpy as np

from stages.codings.free_steps import FreeSteps
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.codings.multigrain import Multigrain
from stages.codings.oat import Oat
from stages.codings.one_spike import OneSpike
from stages.codings.phase import Phase
from stages.codings.rate import Rate
from stages.codings.signed_digit import SignedDigit
from stages.codings.timed import Timed
from stages.codings.ttfs import Ttfs
from stages.codings.two_spike import TwoSpike
from tests.codings.digits import digits_of
from tests.codings.slots import slotted

ONE = np.float32(1)

# |x| -> code, magnitude of the decoded value, spikes; of x itself for the codings in SIGNED
Neuron = Callable[[np.float32], tuple[int, np.float32, int]]


def bank(scales: np.ndarray, timesteps: int, v0: float) -> Neuron:
    """n base-2 neurons: the first whose range holds |x| integrates |x| / tau + v0."""

    def neuron(x: np.float32) -> tuple[int, np.float32, int]:
        k = 0
        while k < len(scales) - 1 and not x < scales[k] * (ONE - np.float32(v0)):
            k += 1
        v, theta = x / scales[k] + np.float32(v0), ONE
        code = count = 0
        for _ in range(timesteps):
            theta = theta / np.float32(2)
            code *= 2
            if v >= theta:
                v = v - theta
                code += 1
                count += 1
        return (k << timesteps) + code, np.float32(code * 2.0**-timesteps) * scales[k], count

    return neuron


def steps(p: dict[str, np.ndarray], max_spikes: int | None) -> Neuron:
    """v(1) = |x| / tau + v0; s(t) = [v >= theta(t)]; v -= h(t) s(t); y += d(t) s(t)."""
    triples = list(zip(p["d"], p["h"], p["theta"], strict=True))
    scale, v0 = p["scale"][()], p["v0"][()]

    def neuron(x: np.float32) -> tuple[int, np.float32, int]:
        v, y = x / scale + v0, np.float32(0)
        code = count = 0
        for d, h, theta in triples:
            code *= 2
            if v >= theta and (max_spikes is None or count < max_spikes):
                v = v - h
                y = y + d
                code += 1
                count += 1
        return code, y * scale, count

    return neuron


def counted(neuron: Neuron) -> Neuron:
    """The neuron with the number of its spikes for a code."""

    def counting(x: np.float32) -> tuple[int, np.float32, int]:
        _, value, count = neuron(x)
        return count, value, count

    return counting


def consecutive(coding: Gated, p: dict[str, np.ndarray]) -> Neuron:
    """n base-2 neurons over ranges with their own floors and steps, binary or with signed digits."""
    scales, longest = p["scale"], coding.longest
    floors = p.get("floor", np.zeros_like(scales))
    steps = p.get("steps", np.full_like(scales, 2.0**coding.timesteps))
    two, half = np.float32(2), np.float32(0.5)

    def neuron(x: np.float32) -> tuple[int, np.float32, int]:
        k = 0
        while k < len(scales) - 1:
            if x < floors[k] + (scales[k] - floors[k]) * (ONE - half / steps[k]):
                break
            k += 1
        width, floor, own = scales[k] - floors[k], floors[k], int(np.log2(steps[k]))
        v = (x - floor) / width
        v = max(v, np.float32(0)) if coding.signed else v + half / steps[k]
        code, count, weight = 0, int(floor > 0), ONE
        for t in range(1, longest + 1):
            weight, code, sign = weight / two, 2 * code, 0
            if t <= own and coding.signed:
                reach = (2 ** (own - t) * 2 // 3 + 0.5) / 2**own
                sign = int(v >= np.float32(reach)) - int(v < -np.float32(reach))
            elif t <= own:
                sign = int(v >= weight)
            v = v - np.float32(sign) * weight
            code, count = code + sign, count + abs(sign)
        if coding.radix > 2:
            digits = digits_of(code >> (longest - own), own, coding.radix, coding.signed)
            count = sum(map(bool, digits[:-1])) + bool(digits[-1] or floor > 0)
        return (k << longest) + code, np.float32(code * 2.0**-longest) * width + floor, count

    return neuron


def falling_threshold(levels: np.ndarray, thresholds: np.ndarray) -> Neuron:
    """One spike at the first threshold, from the highest down, that |x| reaches."""

    def neuron(x: np.float32) -> tuple[int, np.float32, int]:
        for t, threshold in enumerate(reversed(thresholds)):
            if x >= threshold:
                return t, levels[len(levels) - 1 - t], 1
        return len(thresholds), np.float32(0), 0

    return neuron


def latency(p: dict[str, np.ndarray], timesteps: int, silent_zero: bool) -> Neuron:
    """One spike at the first t whose level is at most half a step above x; the last has no lower."""
    origin, step = p["origin"][()], p["step"][()]

    def first(wait: np.float32) -> int:
        t = 0
        while t < timesteps - 1 and wait > t + 0.5:
            t += 1
        return t

    def neuron(x: np.float32) -> tuple[int, np.float32, int]:
        t = first(origin - x / step)
        value = (origin - np.float32(t)) * step
        silent = silent_zero and t == first(origin)
        return (timesteps, value, 0) if silent else (t, value, 1)

    return neuron


def half(timesteps: int) -> float:
    """Half of the last step of a base-2 neuron."""
    return 1 / (2 * 2**timesteps)


DEFINITIONS: dict[type, Callable[..., Neuron]] = {
    Las: lambda c, p: bank(
        p["scale"], c.timesteps, {"zero": 0.0, "half_step": half(c.timesteps)}[c.v0]
    ),
    Gated: consecutive,
    SignedDigit: consecutive,
    Multigrain: lambda c, p: steps(p, None),
    Phase: lambda c, p: steps(p, c.max_spikes),
    FreeSteps: lambda c, p: steps(p, None),
    Rate: lambda c, p: counted(steps(p, None)),
    TwoSpike: lambda c, p: steps(p, c.max_spikes),
    Oat: lambda c, p: bank(
        p["scale"], c.timesteps, {"zero": 0.0, "half_step": half(c.timesteps)}[c.v0]
    ),
    OneSpike: lambda c, p: falling_threshold(p["levels"], p["thresholds"]),
    Timed: lambda c, p: slotted(c, p, falling_threshold),
    Ttfs: lambda c, p: latency(p, c.timesteps, c.silent_zero),
}
