"""Algorithm 1 of the paper: alternating fits of {h, theta} and d, all sites and allocations at once.

Step t of grain g weighs B_g^-(t+1) with t counting all steps (Distribution-Aware Multi-Granularity
Phase Coding, ICLR 2026). Adam works element-wise, so one optimiser over the stacked problems is the
same as one a problem.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from stages.atoms import Atoms
from stages.compiler import fused
from stages.errors import InputError
from stages.registry import register

SLOPE_UNITS = ("relative", "absolute")
SMALLEST_BASE = 1.05
COMPILED_FROM = 2e9  # steps of values in all iterations
PROBLEMS_AT_ONCE = 1 << 21  # values held by one batch of problems


@register("fit/algorithm1")
@dataclass(frozen=True)
class Algorithm1:
    """The paper's alternation: `rounds` times N1 = `neuron_steps` Adam steps on {h, theta}, then
    N2 = `base_steps` on the output bases d.

    eta1, eta2 = `neuron_lr`, `base_lr`. `slope` is that of the sigmoid surrogate: `relative`
    `slope_units` are those of the normalised magnitude |x| / tau, `absolute` ones those of |x| as in
    the paper's released code, so that absolute 10 is relative 10 tau. Every grain starts at each base
    of `starts` in turn and the best fit is kept; the paper starts at 2 alone. Without any step the
    starts themselves are compared.
    """

    rounds: int = 4
    neuron_steps: int = 20
    base_steps: int = 20
    neuron_lr: float = 1e-3
    base_lr: float = 1e-3
    slope: float = 10.0
    starts: tuple[float, ...] = (2.0,)
    slope_units: str = "relative"

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", tuple(self.starts))
        if not self.starts or min(self.starts) <= 1:
            raise InputError(
                f"coding.algorithm1.starts={list(self.starts)}: give one base above 1 at least"
            )
        steps = (self.rounds, self.neuron_steps, self.base_steps)
        rates = (self.neuron_lr, self.base_lr, self.slope)
        if min(steps) < 0 or min(rates) <= 0:
            raise InputError(
                f"coding.algorithm1={self}: steps must be whole numbers >= 0, learning rates and "
                "slope positive"
            )
        if self.slope_units not in SLOPE_UNITS:
            raise InputError(
                f"coding.algorithm1.slope_units={self.slope_units!r}: choose {' or '.join(SLOPE_UNITS)}"
            )

    def slopes(self, scale: Tensor) -> Tensor:
        """The surrogate's slope in units of the normalised magnitude at tau = scale [P], [P]."""
        scale = scale.float()
        return self.slope * (scale if self.slope_units == "absolute" else torch.ones_like(scale))


def allocations(timesteps: int, grains: int) -> Tensor:
    """Every division of T steps into n consecutive grains, as the grain of each step [A, T].

    Parts have two steps at least where T allows it, else one (the paper's search space).
    """
    smallest = 2 if timesteps >= 2 * grains else 1
    free = timesteps - grains * (smallest - 1)
    rows = []
    for cuts in itertools.combinations(range(1, free), grains - 1):
        parts = torch.tensor([0, *cuts, free]).diff() + smallest - 1
        rows.append(torch.repeat_interleave(torch.arange(grains), parts))
    if not rows:
        raise InputError(
            f"coding.grains={grains} with coding.timesteps={timesteps}: every grain needs a "
            "step; give at most as many grains as timesteps"
        )
    return torch.stack(rows)


@dataclass
class Bases:
    """The learnable bases of P problems with n grains: output d, reset h, threshold theta [P, n].

    Tied bases are one tensor. v0 is half of the last output weight, or zero.
    """

    d: Tensor
    h: Tensor
    theta: Tensor
    half_step: bool
    grain: Tensor = field(repr=False)  # [P, T]

    @classmethod
    def start(cls, grain: Tensor, initial: Tensor, tied: bool, half_step: bool) -> Bases:
        """Output, reset and threshold base alike: initial [P, n]; 2 is plain binary phase coding."""
        parts = [initial.clone() for _ in range(1 if tied else 3)]
        d, h, theta = parts * 3 if tied else parts
        return cls(d, h, theta, half_step, grain)

    def steps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d(t), h(t), theta(t), each [P, T], and v0 [P]."""
        exponent = -torch.arange(1.0, self.grain.shape[1] + 1)
        d, h, theta = (
            base.gather(-1, self.grain) ** exponent for base in (self.d, self.h, self.theta)
        )
        return d, h, theta, d[:, -1] / 2 if self.half_step else torch.zeros(len(d))


def loss_and_slopes(
    u: Tensor, weight: Tensor, d: Tensor, h: Tensor, theta: Tensor, v0: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Squared error of every problem on normalised magnitudes u [P, K] that weigh `weight`, [P], and
    its derivatives by the steps d, h, theta [P, T] and by v0 [P], where a spike has the derivative of
    sigmoid(slope x), slope [P]. One pass over the values where it is compiled."""
    v, y, steep = u + v0[:, None], torch.zeros_like(u), slope[:, None]
    above, spikes = [], []
    for t in range(d.shape[1]):
        above.append(v - theta[:, t, None])
        spikes.append((above[t] >= 0).to(u.dtype))
        v = v - spikes[t] * h[:, t, None]
        y = y + spikes[t] * d[:, t, None]
    error = y - u
    by_y, by_v = 2 * error * weight, torch.zeros_like(u)
    slopes: list[list[Tensor]] = [[], [], []]
    for t in reversed(range(d.shape[1])):
        soft = torch.sigmoid(steep * above[t])
        slopes[0].append((by_y * spikes[t]).sum(-1))
        slopes[1].append(-(by_v * spikes[t]).sum(-1))
        fired = (by_y * d[:, t, None] - by_v * h[:, t, None]) * (steep * soft * (1 - soft))
        slopes[2].append(-fired.sum(-1))
        by_v = by_v + fired
    by_d, by_h, by_theta = (torch.stack(each[::-1], -1) for each in slopes)
    return (error * error * weight).sum(-1), by_d, by_h, by_theta, by_v.sum(-1)


_compiled = fused(loss_and_slopes)


def fit_bases(
    atoms: Atoms,
    grain: Tensor,
    *,
    scale: Tensor,
    grains: int,
    tied: bool,
    half_step: bool,
    algorithm: Algorithm1,
) -> tuple[dict[str, Tensor], Tensor]:
    """Fit every allocation grain [A, T] from every start to every site and keep the best
    parameters ever seen. Magnitudes are normalised by scale [sites]; those above it are clipped by
    the neuron, and count in the loss.

    Returns scale, v0 [sites], d, h, theta [sites, T] (what the neuron runs with), the bases
    base_d, base_h, base_theta [sites, n], the chosen allocation grain [sites, T], and the loss curve
    of that allocation [sites, iterations].
    """
    u = (atoms.value / scale[:, None]).float()
    weight = atoms.errors()
    weight = (weight / weight.sum(-1, keepdim=True)).float()
    starts = torch.tensor(list(itertools.product(algorithm.starts, repeat=grains)))  # [K, n]
    sites, problems = len(u), len(u) * len(grain) * len(starts)
    initial = starts.repeat(len(grain), 1).repeat_interleave(sites, 0)
    grain = grain.repeat_interleave(len(starts) * sites, 0)  # [A * K * sites, T]
    size = max(1, PROBLEMS_AT_ONCE // u.shape[1])
    iterations = algorithm.rounds * (algorithm.neuron_steps + algorithm.base_steps)
    # A short fit is over before a kernel is compiled.
    long = problems * u.shape[1] * grain.shape[1] * iterations >= COMPILED_FROM
    derivatives = _compiled if long else loss_and_slopes
    slope = algorithm.slopes(scale)
    results = []
    chunks = torch.arange(problems).split(size)
    with tqdm(total=len(chunks) * iterations, desc="fitting", disable=None) as progress:
        for chunk in chunks:
            bases = Bases.start(grain[chunk], initial[chunk], tied, half_step)
            site = chunk % sites
            loss = functools.partial(derivatives, u[site], weight[site], slope=slope[site])
            results.append(_descend(bases, loss, algorithm, progress))
    losses, kept, curve = (torch.cat(parts) for parts in zip(*results, strict=True))
    choice = losses.view(-1, sites).argmin(0) * sites + torch.arange(sites)
    d, h, theta = kept[choice].unbind(1)
    best = Bases(d, h, theta, half_step, grain[choice])
    steps = dict(zip(("d", "h", "theta", "v0"), best.steps(), strict=True))
    bases_kept = {"base_d": d, "base_h": h, "base_theta": theta, "grain": best.grain.float()}
    return steps | bases_kept | {"scale": scale.float()}, curve[choice]


def _descend(
    bases: Bases,
    loss_and_derivatives: Callable[..., tuple[Tensor, ...]],
    algorithm: Algorithm1,
    progress: tqdm,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the alternation: best loss [P], its bases [P, 3, n], and the loss curve [P, iterations + 1]."""
    groups: Sequence[tuple[list[Tensor], float, int]] = (
        ([bases.h, bases.theta], algorithm.neuron_lr, algorithm.neuron_steps),
        ([bases.d], algorithm.base_lr, algorithm.base_steps),
    )
    optimisers = [torch.optim.Adam(_unique(tensors), lr=rate) for tensors, rate, _ in groups]
    best = torch.full((len(bases.d),), torch.inf)
    kept = torch.stack([bases.d, bases.h, bases.theta], 1)
    curve = []

    def note(value: Tensor) -> None:
        nonlocal best, kept
        curve.append(value)
        better = value < best
        best = torch.where(better, value, best)
        now = torch.stack([bases.d, bases.h, bases.theta], 1).detach()
        kept = torch.where(better[:, None, None], now, kept)

    for _ in range(algorithm.rounds):
        for optimiser, (tensors, _, steps) in zip(optimisers, groups, strict=True):
            for tensor in (bases.d, bases.h, bases.theta):
                tensor.requires_grad_(any(tensor is t for t in tensors))
            for _ in range(steps):
                weights = bases.steps()
                with torch.no_grad():
                    value, *derivatives = loss_and_derivatives(*weights)
                note(value)
                optimiser.zero_grad()
                moved = [
                    (w, g) for w, g in zip(weights, derivatives, strict=True) if w.requires_grad
                ]
                torch.autograd.backward([w for w, _ in moved], [g for _, g in moved])
                optimiser.step()
                with torch.no_grad():
                    for tensor in tensors:
                        tensor.clamp_(min=SMALLEST_BASE)
                progress.update()
    with torch.no_grad():
        note(loss_and_derivatives(*bases.steps())[0])
    return best, kept, torch.stack(curve, -1)


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())
