"""Every neuron once more, one step at a time in float32, written from its equations.

A new coding that is a neuron needs a line in `REFERENCES`, and its definition, one value at a time, one
in `scalar.DEFINITIONS`; the tests fail without them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Coding
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
from stages.errors import InputError
from stages.fits.algorithm1 import Algorithm1
from stages.fits.statistics import Products
from stages.neurons.spikes import decode
from tests.codings import scalar
from tests.codings.digits import nonzero_digits
from tests.codings.slots import slotted

CONF = Path(__file__).parents[2] / "conf" / "coding"
ONE = np.float32(1)
START = {"zero": 0.0, "half_step": 0.5}  # v0 in units of the last step of a base-2 neuron
TIMESTEPS = (1, 2, 4, 6, 8, 10)
OPTIONS = {
    "v0": ("zero", "half_step"),
    "tied": (True, False),
    "max_spikes": (None, 1, 2),
    "offset": (True,),
    "radix": (4, 8, 2**16),
    "grain_steps": ((1, 0), (-1, 1)),
    "base": (None, 1.4),
    "silent_zero": (True, False),
    "levels": (None, 3),
}

# |x| [N] -> codes, magnitudes of the decoded values, spikes; of x itself for the codings in SIGNED
Neuron = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def bank(scales: np.ndarray, timesteps: int, v0: float) -> Neuron:
    """n base-2 neurons: the first whose range holds |x| integrates |x| / tau + v0."""

    def neuron(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        k = np.zeros(x.shape, np.int64)
        for j, scale in enumerate(scales[:-1]):
            k += (k == j) & ~(x < scale * (ONE - np.float32(v0)))
        v, theta = x / scales[k] + np.float32(v0), ONE
        code, count = np.zeros_like(k), np.zeros_like(k)
        for _ in range(timesteps):
            theta = theta / np.float32(2)
            spike = v >= theta
            v = np.where(spike, v - theta, v)
            code, count = 2 * code + spike, count + spike
        value = (code * 2.0**-timesteps).astype(np.float32) * scales[k]
        return (k << timesteps) + code, value, count

    return neuron


def steps(p: dict[str, np.ndarray], max_spikes: int | None) -> Neuron:
    """v(1) = |x| / tau + v0; s(t) = [v >= theta(t)]; v -= h(t) s(t); y += d(t) s(t)."""
    triples = list(zip(p["d"], p["h"], p["theta"], strict=True))
    scale, v0 = p["scale"][()], p["v0"][()]
    limit = len(triples) if max_spikes is None else max_spikes

    def neuron(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        v, y = x / scale + v0, np.zeros_like(x)
        code, count = np.zeros(x.shape, np.int64), np.zeros(x.shape, np.int64)
        for d, h, theta in triples:
            spike = (v >= theta) & (count < limit)
            v, y = np.where(spike, v - h, v), np.where(spike, y + d, y)
            code, count = 2 * code + spike, count + spike
        return code, y * scale, count

    return neuron


def counted(neuron: Neuron) -> Neuron:
    """The neuron with the number of its spikes for a code."""

    def counting(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        _, value, count = neuron(x)
        return count, value, count

    return counting


def consecutive(coding: Gated, p: dict[str, np.ndarray]) -> Neuron:
    """n base-2 neurons over ranges with their own floors and steps, binary or with signed digits."""
    scales, longest = p["scale"], coding.longest
    floors = p.get("floor", np.zeros_like(scales))
    steps = p.get("steps", np.full_like(scales, 2.0**coding.timesteps))
    two, half = np.float32(2), np.float32(0.5)
    limits = floors + (scales - floors) * (ONE - half / steps)

    def neuron(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        k = np.zeros(x.shape, np.int64)
        for j, limit in enumerate(limits[:-1]):
            k += (k == j) & ~(x < limit)
        width, floor, own = (scales - floors)[k], floors[k], np.log2(steps).astype(np.int64)[k]
        v = (x - floor) / width
        v = np.maximum(v, np.float32(0)) if coding.signed else v + half / steps[k]
        code, count, weight = np.zeros_like(k), (floor > 0).astype(np.int64), ONE
        for t in range(1, longest + 1):
            weight, later = weight / two, np.maximum(own - t, 0)
            if coding.signed:
                reach = ((2**later * 2 // 3 + 0.5) / 2.0**own).astype(np.float32)
                sign = (v >= reach).astype(np.int64) - (v < -reach)
            else:
                sign = (v >= weight).astype(np.int64)
            sign = np.where(t <= own, sign, 0)
            v = v - sign.astype(np.float32) * weight
            code, count = 2 * code + sign, count + np.abs(sign)
        value = (code * 2.0**-longest).astype(np.float32) * width + floor
        if coding.radix > 2:
            level = code >> (longest - own)
            count = nonzero_digits(level, own, coding.radix, coding.signed, floor > 0)
        return (k << longest) + code, value, count

    return neuron


def falling_threshold(levels: np.ndarray, thresholds: np.ndarray) -> Neuron:
    """One spike at the first threshold, from the highest down, that |x| reaches."""

    def neuron(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        time = np.zeros(x.shape, np.int64)
        for t, threshold in enumerate(reversed(thresholds)):
            time += (time == t) & ~(x >= threshold)
        fires = time < len(thresholds)
        value = np.where(fires, levels[len(levels) - 1 - time], np.float32(0))
        return time, value, fires.astype(np.int64)

    return neuron


def latency(p: dict[str, np.ndarray], timesteps: int, silent_zero: bool) -> Neuron:
    """One spike at the first t whose level is at most half a step above x; the last has no lower."""
    origin, step = p["origin"][()], p["step"][()]

    def first(wait: np.ndarray) -> np.ndarray:
        time = np.zeros(wait.shape, np.int64)
        for t in range(timesteps - 1):
            time += (time == t) & (wait > np.float32(t + 0.5))
        return time

    def neuron(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        time = first(origin - x / step)
        value = (origin - time.astype(np.float32)) * step
        silent = silent_zero & (time == first(origin))
        return np.where(silent, timesteps, time), value, np.where(silent, 0, 1)

    return neuron


REFERENCES: dict[type, Callable[..., Neuron]] = {
    Las: lambda c, p: bank(p["scale"], c.timesteps, START[c.v0] / 2**c.timesteps),
    Gated: consecutive,
    SignedDigit: consecutive,
    Multigrain: lambda c, p: steps(p, None),
    Phase: lambda c, p: steps(p, c.max_spikes),
    FreeSteps: lambda c, p: steps(p, None),
    Rate: lambda c, p: counted(steps(p, None)),
    TwoSpike: lambda c, p: steps(p, c.max_spikes),
    Oat: lambda c, p: bank(p["scale"], c.timesteps, START[c.v0] / 2**c.timesteps),
    OneSpike: lambda c, p: falling_threshold(p["levels"], p["thresholds"]),
    Timed: lambda c, p: slotted(c, p, falling_threshold),
    Ttfs: lambda c, p: latency(p, c.timesteps, c.silent_zero),
}
SIGNED = (Ttfs,)  # not sign and magnitude: one interval holds both signs


def reference(coding: Coding, p: dict[str, Tensor]) -> Neuron:
    """The neuron of one site, a loop over its steps; fails for a coding that has none."""
    return _reference(coding, p, REFERENCES, __file__)


def definition(coding: Coding, p: dict[str, Tensor]) -> scalar.Neuron:
    """The scalar neuron of one site; fails for a coding that has none."""
    return _reference(coding, p, scalar.DEFINITIONS, scalar.__file__)


def _reference(coding: Coding, p: dict[str, Tensor], makers: dict[type, Any], file: str) -> Any:
    if type(coding) not in makers:
        pytest.fail(f"{type(coding).__name__} is a neuron: add its loop to {file}")
    return makers[type(coding)](coding, {name: value.numpy() for name, value in p.items()})


# --- which codings --------------------------------------------------------------------------------


def shipped() -> dict[str, Coding]:
    """Every coding of conf/coding that is a neuron of single values, by the name of its file."""
    root = OmegaConf.create({"timesteps": 6})
    codings = {}
    for path in sorted(CONF.glob("*.yaml")):
        cfg = OmegaConf.merge(root, {"coding": OmegaConf.load(path)})
        codings[path.stem] = instantiate(cfg.coding)
    # With a sensitivity they are the neurons of `gated`, with ranges from a measured model.
    plain = {name: c for name, c in codings.items() if getattr(c, "sensitivity", None) is None}
    scalar: dict[str, Any] = {name: c for name, c in plain.items() if not c.tokenwise}
    for name, coding in scalar.items():
        if getattr(coding, "granularity", "site") == "channel":  # the same neuron, on x / s
            scalar[name] = replace(coding, granularity="site")
    return {name: c for name, c in scalar.items() if getattr(c, "neuron", False)}


def variants(coding: Coding, timesteps: Iterable[int] = TIMESTEPS) -> Iterator[Coding]:
    """The coding with every T and 1 to 3 grains that it allows, and at its own T each option."""
    named = {field.name for field in fields(coding)}
    changes = [{"timesteps": t, "grains": n} for t in timesteps for n in (1, 2, 3)]
    changes += [{name: value} for name, values in OPTIONS.items() for value in values]
    seen = set()
    for change in changes:
        try:
            variant = replace(coding, **{k: v for k, v in change.items() if k in named})
        except InputError:
            continue  # such as more grains than steps
        if variant not in seen:
            seen.add(variant)
            yield variant


def label(coding: Coding) -> str:
    """A readable test id of everything that makes the coding."""
    return "-".join(str(getattr(coding, field.name)) for field in fields(coding))


# --- data -----------------------------------------------------------------------------------------


def heavy_tailed(sites: int, size: int, seed: int = 0) -> Tensor:
    """Signed values of every site, kurtosis in the hundreds, scales a factor 3 apart, [sites, size]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sites, size, generator=generator)
    x = x * torch.exp(1.2 * torch.randn(sites, size, generator=generator))
    return x * 3.0 ** torch.arange(sites)[:, None]


def atoms_of(x: Tensor, maximum: Tensor | None = None) -> Atoms:
    """Every value [sites, K] as an atom of its own magnitude, which enters products 100 wide."""
    value = x.abs().double().sort(-1).values
    maximum = value[:, -1] if maximum is None else maximum
    macs = torch.full((len(x),), 1000.0).double()
    size = {Products.name: {"macs": macs, "accumulators": macs / 100}}
    weight = torch.full_like(value, 1 / x.shape[1])
    return Atoms(value, torch.zeros_like(value), weight, maximum, statistics=size)


def learning(coding: Any, algorithm: Algorithm1) -> Coding:
    """The coding with other settings of Algorithm 1; itself if it is not trained."""
    found: Coding = replace(coding, algorithm1=algorithm) if coding.trained else coding
    return found


def fitted(coding: Coding, sites: int = 2, unit: float = 1.0) -> dict[str, Tensor]:
    """Float32 parameters of the coding, fitted fast enough to leave their starting values; to values of
    another `unit`."""
    quick = Algorithm1(
        rounds=2, neuron_steps=8, base_steps=8, neuron_lr=0.003, base_lr=0.003, slope=200
    )
    fit = learning(coding, quick).fit(atoms_of(unit * heavy_tailed(sites, 200)))
    return {name: value.float() for name, value in fit.params.items()}


def bfloat16_patterns() -> Tensor:
    """All finite bfloat16 values, both zeros and the subnormal ones among them."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return x[x.isfinite()]


def around_breakpoints(neuron: Neuron, levels: Tensor) -> Tensor:
    """Two float32 below and two from every place on where the neuron's code changes, both signs.

    Found by bisecting the bit patterns between neighbours of a grid that has two points a level.
    """
    levels = levels.double().unique()
    grid = torch.cat([levels, (levels[1:] + levels[:-1]) / 2, bfloat16_patterns().double().abs()])
    bits = grid.float().unique().view(torch.int32).numpy()
    codes = _codes(neuron, bits)
    change = codes[1:] != codes[:-1]
    low, high, below = bits[:-1][change], bits[1:][change], codes[:-1][change]
    while (high - low).max(initial=0) > 1:
        middle = low + (high - low) // 2
        same = _codes(neuron, middle) == below
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    near = np.concatenate([low - 1, low, high, high + 1])
    x = torch.from_numpy(near[near >= 0]).view(torch.float32)
    return torch.cat([x, -x])


def breakpoints(coding: Coding, p: dict[str, Tensor]) -> Tensor:
    """`around_breakpoints` of one site's neuron, for a signed one those of either sign."""
    neuron, levels = reference(coding, p), coding.table(p).abs()
    x = around_breakpoints(neuron, levels)
    if isinstance(coding, SIGNED):
        x = torch.cat([x, around_breakpoints(lambda v: neuron(-v), levels)])
    return x


def _codes(neuron: Neuron, bits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return neuron(bits.view(np.float32))[0]


def seen(coding: Coding, x: Tensor) -> np.ndarray:
    """What a neuron gets: magnitudes, or the values themselves for the codings in SIGNED."""
    return (x.float() if isinstance(coding, SIGNED) else x.float().abs()).numpy()


# --- the check ------------------------------------------------------------------------------------


def check_equal(coding: Coding, p: dict[str, Tensor], x: Tensor) -> None:
    """Asserts that `encode`, `decode` and `quantise` give the reference's code, value and count."""
    with np.errstate(over="ignore"):
        columns = reference(coding, p)(seen(coding, x))
    code, value, count = (torch.from_numpy(column) for column in columns)
    if not isinstance(coding, SIGNED):
        value = x.float().sign() * value
    spikes = coding.encode(x, p)
    fast_value, fast_count = coding.quantise(x, p)
    table = coding.table(p)
    assert fast_value.dtype == table.dtype == torch.float32
    assert torch.equal(spikes.code, code)
    assert torch.equal(spikes.count, count)
    assert torch.equal(decode(spikes, table), value)
    assert torch.equal(fast_value, value)
    assert torch.equal(fast_count.long(), count)
