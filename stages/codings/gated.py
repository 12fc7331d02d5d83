"""Range-gated base-2 neurons: n ranges, of which the smallest that holds a value codes it.

The density of levels is piecewise constant, the n-piece approximation of lambda* ∝ p^(1/3). The ranges
come from an exact search over the distribution, not from a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.codings import neurons
from stages.codings.coding import Fit, check_timesteps
from stages.errors import InputError

if TYPE_CHECKING:
    from stages.distribution import Atoms
    from stages.fitting import Algorithm1

# Candidate ranges: 16 octaves below the maximum at six an octave, then finer around the best ones.
OCTAVES = 16
PER_OCTAVE = 6
REFINEMENTS = (1 / 24, 1 / 96, 1 / 384)
SITES_AT_ONCE = 16


@dataclass(frozen=True)
class Gated:
    """`grains` neurons per activation with scales tau_1 < … < tau_n and v0 = tau_k 2^-(T+1).

    Gate: the smallest k with |x| < tau_k (1 - 2^-(T+1)), else n, which saturates. Only that neuron
    spikes. n neurons are log2(n) more bits: compare at equal T + log2(n) too.
    """

    name: str
    timesteps: int
    grains: int

    trained = False
    neuron = True

    def __post_init__(self) -> None:
        check_timesteps(self.name, self.timesteps)
        if not isinstance(self.grains, int) or not 1 <= self.grains <= 8:
            raise InputError(
                f"coding.grains={self.grains!r} for {self.name}: give a whole number from 1 to 8"
            )

    @property
    def decode_macs(self) -> int:
        return self.grains

    @property
    def gate_comparisons(self) -> int:
        return self.grains - 1

    def fit(self, atoms: Atoms, algorithm: Algorithm1 | None) -> Fit:
        parts = (t.split(SITES_AT_ONCE) for t in (atoms.value, atoms.spread, atoms.weight))
        scales = [
            best_scales(value, spread, weight, self.grains, self.timesteps)
            for value, spread, weight in zip(*parts, strict=True)
        ]
        return Fit({"scale": torch.cat(scales)})

    def encode(self, x: Tensor, p: neurons.Params) -> neurons.Spikes:
        return neurons.bank_encode(x, p, self.timesteps, self._v0)

    def table(self, p: neurons.Params) -> Tensor:
        return neurons.bank_table(p, self.timesteps)

    def quantise(self, x: Tensor, p: neurons.Params) -> tuple[Tensor, Tensor]:
        return neurons.bank_quantise(x, p, self.timesteps, self._v0)

    @property
    def _v0(self) -> float:
        return 2.0 ** -(self.timesteps + 1)


def best_scales(
    value: Tensor, spread: Tensor, weight: Tensor, grains: int, timesteps: int
) -> Tensor:
    """The n scales of least expected squared error, [sites, n] ascending, by dynamic programming.

    value, spread, weight [sites, K]: atoms, ascending. Exact over the candidates; those are refined
    around the optimum until they lie 1/384 of an octave apart.
    """
    top = value.amax(-1, keepdim=True)
    octaves = torch.arange(-OCTAVES * PER_OCTAVE, 4, dtype=torch.float64) / PER_OCTAVE
    best = _search(value, spread, weight, top * 2.0**octaves, grains, timesteps)
    near = torch.arange(-4, 5, dtype=torch.float64)
    for fraction in REFINEMENTS:
        local = best[..., None] * 2.0 ** (near * fraction)
        candidates = local.flatten(1).sort(-1).values
        best = _search(value, spread, weight, candidates, grains, timesteps)
    return best


def _search(
    value: Tensor, spread: Tensor, weight: Tensor, scale: Tensor, grains: int, timesteps: int
) -> Tensor:
    """Best ascending choice of `grains` among candidate scales [sites, J], ascending."""
    below, beyond = _costs(value, spread, weight, scale, timesteps)
    own = below.diagonal(dim1=-2, dim2=-1)
    total, choice = own, []
    # total[j]: least cost of everything below candidate j's limit if j is the k-th range.
    rising = torch.ones_like(below[0]).tril().bool()  # [j, i]: i <= j
    for _ in range(grains - 1):
        options = torch.where(rising, total[:, None, :] - below, torch.inf)
        step = options.min(-1)
        choice.append(step.indices)
        total = own + step.values
    last = (total + beyond).argmin(-1, keepdim=True)
    picked = [last]
    for indices in reversed(choice):
        picked.append(indices.gather(-1, picked[-1]))
    return scale.gather(-1, torch.cat(picked[::-1], -1))


def _costs(
    value: Tensor, spread: Tensor, weight: Tensor, scale: Tensor, timesteps: int
) -> tuple[Tensor, Tensor]:
    """below [sites, j, i]: error of candidate j on all values under candidate i's limit;
    beyond [sites, j]: its error on the values that saturate it."""
    step = scale * 2.0**-timesteps
    limit = scale * (1 - 2.0 ** -(timesteps + 1))
    error = step[..., None] ** 2 * rounding_error(
        value[:, None] / step[..., None], spread[:, None] / step[..., None]
    )
    running = torch.nn.functional.pad((error * weight[:, None]).cumsum(-1), (1, 0))
    under = torch.searchsorted(value, limit)
    below = running.gather(-1, under[:, None, :].expand(-1, scale.shape[1], -1))
    top = (scale - step)[..., None]
    over = (value[:, None] >= limit[..., None]).double()
    miss = ((value[:, None] - top) ** 2 + spread[:, None] ** 2) * weight[:, None]
    return below, (miss * over).sum(-1)


def rounding_error(mean: Tensor, spread: Tensor) -> Tensor:
    """Mean squared distance to the nearest whole number of values spread evenly about `mean` with
    standard deviation `spread`, exactly: differences of the integral of (z - round z)^2."""
    half = spread * 3**0.5
    narrow = half < 1e-3
    wide = torch.where(narrow, 1.0, half)
    spread_out = (_integral(mean + wide) - _integral(mean - wide)) / (2 * wide)
    return torch.where(narrow, (mean - mean.round()) ** 2 + spread**2, spread_out)


def _integral(z: Tensor) -> Tensor:
    whole = z.round()
    return whole / 12 + (z - whole) ** 3 / 3
