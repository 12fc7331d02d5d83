"""The companding quantiser, whose levels lie at a density λ ∝ p^α: a bound, not a neuron."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.atoms import Atoms, cells
from stages.codings.lloyd_max import LloydMax
from stages.errors import InputError
from stages.fits.quantiser import running
from stages.fitted import Fit
from stages.neurons.levels import level_params
from stages.registry import register


@register("coding/compander", was="stages.codings.compander.Compander")
@dataclass(frozen=True)
class Compander(LloydMax):
    """2^T magnitude levels at equal mass of λ(x) ∝ p(x)^α over x = |x| > 0, and zero apart: α = 0 is
    uniform up to the largest value, α = 1/3 least squared error at high resolution, α = 1 equal
    probability.

    Sources: Bennett 1948; Panter & Dite 1951.
    """

    name: str = "compander"
    alpha: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise InputError(
                f"coding.alpha={self.alpha} for {self.name}: give a number from 0 (uniform) to 1 "
                "(equal probability)"
            )

    def fit(self, atoms: Atoms) -> Fit:
        edges, weight = cells(atoms)
        mass = running(weight**self.alpha * edges.diff() ** (1 - self.alpha))
        levels = 2**self.timesteps
        want = (torch.arange(levels, dtype=mass.dtype) + 0.5) / levels * mass[:, -1:]
        after = torch.searchsorted(mass, want).clamp(1, weight.shape[1])
        (low, high), (start, stop) = (
            (t.gather(-1, after - 1), t.gather(-1, after)) for t in (mass, edges)
        )
        inside = (want - low) / (high - low).clamp(min=1e-300)
        return Fit(level_params(start + inside.clamp(0, 1) * (stop - start)))


def panter_dite(atoms: Atoms, levels: int) -> Tensor:
    """Squared error of L optimal magnitude levels at high resolution, (∫ p^(1/3))³ / (12 L²) with p
    the density of |x| apart from zero, [sites] float64 (Panter & Dite 1951)."""
    edges, weight = cells(atoms)
    return (weight * edges.diff() ** 2).pow(1 / 3).sum(-1) ** 3 / (12 * levels**2)
