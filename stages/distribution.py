"""Stage 2: from a sketch to weighted atoms, a density, the optimal level density and a sampler."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.atoms import EXTREME_BINS, Atoms, merge
from stages.errors import InputError
from stages.sketch import SketchSet

CELLS_PER_OCTAVE = 8
NAMED = 8  # constant sites whose values a refusal lists
SITES_AT_ONCE = 64  # of a megabyte each while their bins are dense


@dataclass(frozen=True)
class Densities:
    """What is known of every site's values.

    atoms: as above; the filled magnitude bins of site i are [bin_offsets[i], bin_offsets[i + 1]) of
    bin_count, bin_mean and bin_spread; edges [C + 1]: cells of equal width in log2; density, optimal
    [sites, C]: p(|x|) and lambda*(|x|), each integrating to one over the cells (zeros apart); bennett
    [sites]: (integral p^(1/3))^3, so that L optimal magnitude levels cost bennett / (12 L^2); moments
    [sites, 4]: count, mean, variance and kurtosis of x; extremes [sites, 2]: smallest and largest x.
    """

    sites: tuple[str, ...]
    roles: tuple[str, ...]
    layers: tuple[int, ...]
    atoms: Atoms
    tensors: dict[str, Tensor]

    def sample(self, size: int, generator: torch.Generator) -> Tensor:
        """Draw `size` magnitudes of every site from its estimated distribution, [sites, size]."""
        shape = (len(self.sites), size)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        x = 3**0.5 * (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1)
        names = ("bin_count", "bin_mean", "bin_spread")
        sizes = self.tensors["bin_offsets"].diff().tolist()
        bins = zip(*(self.tensors[name].split(sizes) for name in names), strict=True)
        for row, place, (count, mean, spread) in zip(x, uniform, bins, strict=True):
            cumulative = count.cumsum(-1)
            index = torch.searchsorted(cumulative, place * cumulative[-1], right=True)
            index = index.clamp(max=len(count) - 1)
            row.mul_(spread[index]).add_(mean[index])
        return torch.minimum(x.clamp(min=0), self.atoms.maximum[:, None])

    def save(self, folder: Path) -> None:
        save_file(_named(self.atoms) | self.tensors, folder / "densities.safetensors")
        meta = {"sites": self.sites, "roles": self.roles, "layers": self.layers}
        (folder / "densities.json").write_text(json.dumps(meta))

    @classmethod
    def load(cls, folder: Path) -> Densities:
        meta = json.loads((folder / "densities.json").read_text())
        tensors = load_file(folder / "densities.safetensors")
        sites, roles, layers = (tuple(meta[key]) for key in ("sites", "roles", "layers"))
        return cls(sites, roles, layers, _taken(tensors), tensors)


def _named(atoms: Atoms) -> dict[str, Tensor]:
    parts = {k: v for k, v in vars(atoms).items() if isinstance(v, Tensor)}
    return {f"atom_{k}": v.contiguous() for k, v in parts.items()}


def _taken(tensors: dict[str, Tensor]) -> Atoms:
    """The atoms among named tensors, which lose them."""
    names = [name for name in tensors if name.startswith("atom_")]
    parts: dict[str, Any] = {name.removeprefix("atom_"): tensors.pop(name) for name in names}
    return Atoms(**parts)


@dataclass(frozen=True)
class Distribution:
    """`atoms` weighted points stand for a site: its extremes exactly, the rest at equal p^(1/3) mass."""

    atoms: int = 1024

    def __post_init__(self) -> None:
        if not isinstance(self.atoms, int) or self.atoms < 4 * EXTREME_BINS:
            raise InputError(
                f"distribution.atoms={self.atoms!r}: give a whole number of at least "
                f"{4 * EXTREME_BINS}"
            )

    def run(self, sketches: SketchSet) -> Densities:
        """Estimate the distribution of every site; raise InputError for a site of one value."""
        _refuse_constant(sketches)
        cells = Cells.of(sketches)
        parts = [self._estimate(part, cells) for part in sketches.split(SITES_AT_ONCE)]
        tensors = {n: torch.cat([part.pop(n) for part in parts]) for n in list(parts[0])}
        filled = tensors.pop("filled")
        tensors["bin_offsets"] = torch.cat([filled.new_zeros(1), filled.cumsum(0)])
        tensors["edges"] = cells.edges.contiguous()
        atoms = _taken(tensors)
        return Densities(sketches.sites, sketches.roles, sketches.layers, atoms, tensors)

    def _estimate(self, sketches: SketchSet, cells: Cells) -> dict[str, Tensor]:
        """All tensors of some sites, and their number of `filled` bins."""
        count, mean, variance, negative = sketches.magnitudes()
        extremes = sketches.tensors["range"].double()
        edges = sketches.grid.edges()
        atoms = merge(count, mean, variance, edges, extremes.abs().amax(-1), self.atoms, negative)
        some = count > 0
        bins = {
            "filled": some.sum(-1),
            "bin_count": count[some],
            "bin_mean": mean[some],
            "bin_spread": variance[some].sqrt(),
        }
        atoms = replace(atoms, extremes=extremes)
        return _named(atoms) | bins | _densities(sketches, count, cells)


@dataclass(frozen=True)
class Cells:
    """Cells an eighth of an octave wide, `group` bins each, from the first to the last that any site
    fills; edges [C + 1]."""

    group: int
    first: int
    edges: Tensor

    @classmethod
    def of(cls, sketches: SketchSet) -> Cells:
        grid = sketches.grid
        group = max(1, 2**grid.mantissa_bits // CELLS_PER_OCTAVE)
        bins = sketches.tensors["code"] % grid.magnitudes
        inner = bins[(bins > 0) & (bins < grid.magnitudes - 1)]
        first, last = ((int(each) - 1) // group for each in (inner.min(), inner.max()))
        return cls(group, first, grid.edges()[1:-1:group][first : last + 2])

    def counts(self, count: Tensor) -> Tensor:
        """Sums of bins [sites, M] over the cells, [sites, C]."""
        cells = count[:, 1:-1].unflatten(-1, (-1, self.group)).sum(-1)
        return cells[:, self.first : self.first + len(self.edges) - 1]


def _densities(sketches: SketchSet, count: Tensor, cells: Cells) -> dict[str, Tensor]:
    """p, lambda* and the Bennett value on the cells, and the moments."""
    width = cells.edges.diff()
    density = cells.counts(count) / count.sum(-1, keepdim=True) / width
    cube = density ** (1 / 3)
    norm = (cube * width).sum(-1, keepdim=True)
    total, mean, second, fourth = sketches.signed_moments().unbind(-1)
    kurtosis = fourth / second.clamp(min=1e-300) ** 2
    return {
        "density": density.contiguous(),
        "optimal": (cube / norm).contiguous(),
        "bennett": norm.squeeze(-1) ** 3,
        "moments": torch.stack([total, mean, second, kurtosis], -1),
        "extremes": sketches.tensors["range"].double(),
    }


def _refuse_constant(sketches: SketchSet) -> None:
    low, high = sketches.tensors["range"].unbind(-1)
    same = (low == high).nonzero()
    if len(same):
        places = same.flatten().tolist()
        values = ", ".join(f"{sketches.sites[i]} ({float(low[i]) + 0.0:g})" for i in places[:NAMED])
        more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
        names = [f'"{name}"' if "[" in (name := sketches.sites[i]) else name for i in places]
        raise InputError(
            f"{len(places)} of {len(sketches.sites)} sites hold one constant value, so that there is "
            f"nothing to fit: {values}{more}; leave them dense, 'sites.exclude=[{','.join(names)}]', or "
            "give more calibration text"
        )
