"""Stage 3: fits the neurons of all sites, alone, on values of their own estimated distribution."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.codings.base import Coding, Fit, Partial, error_and_spikes
from stages.distribution import Atoms, Densities
from stages.errors import InputError


@dataclass(frozen=True)
class Algorithm1:
    """The paper's alternation: `rounds` times N1 = `neuron_steps` Adam steps on {h, theta}, then
    N2 = `base_steps` on the output bases d.

    eta1, eta2 = `neuron_lr`, `base_lr`; `slope` is that of the sigmoid surrogate in units of the
    normalised magnitude. Every grain starts at each base of `starts` in turn and the best fit is
    kept; the paper starts at 2 alone. Without any step the starts themselves are compared.
    """

    rounds: int = 4
    neuron_steps: int = 20
    base_steps: int = 20
    neuron_lr: float = 1e-3
    base_lr: float = 1e-3
    slope: float = 10.0
    starts: tuple[float, ...] = (2.0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", tuple(self.starts))
        if not self.starts or min(self.starts) <= 1:
            raise InputError(
                f"fitting.algorithm1.starts={list(self.starts)}: give one base above 1 at least"
            )
        steps = (self.rounds, self.neuron_steps, self.base_steps)
        rates = (self.neuron_lr, self.base_lr, self.slope)
        if min(steps) < 0 or min(rates) <= 0:
            raise InputError(
                f"fitting.algorithm1={self}: steps must be whole numbers >= 0, learning rates and "
                "slope positive"
            )


@dataclass(frozen=True)
class Fitting:
    """`data`: `atoms` (the weighted atoms of the distribution) or `samples` (`samples` magnitudes
    a site drawn from it with `seed`, as the paper does)."""

    data: str = "atoms"
    samples: int = 100_000
    seed: int = 0
    algorithm1: Algorithm1 | None = Algorithm1()

    def __post_init__(self) -> None:
        if self.data not in ("atoms", "samples") or self.samples < 1:
            raise InputError(
                f"fitting.data={self.data!r} with fitting.samples={self.samples}: choose atoms, or "
                "samples with a positive number of them"
            )

    def for_coding(self, coding: Coding) -> Fitting:
        """This fitting without what the coding does not use, so that it does not enter its key."""
        if coding.trained:
            return self if self.data == "samples" else replace(self, samples=1, seed=0)
        return Fitting("atoms", 1, 0, None)

    def run(
        self,
        densities: Densities,
        coding: Coding,
        statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> FittedNeurons:
        """Fits `coding` to every site that it codes, as one batched problem.

        `statistics` are those that the coding declares, with the sites of `densities` first.
        """
        for name, tensors in (statistics or {}).items():
            if any(len(t) != len(densities.sites) for t in tensors.values()):
                raise InputError(
                    f"{coding.name} needs {name} at every site, but calibration missed some experts: "
                    "give more calibration.windows, or choose a coding without it"
                )
        data = densities.atoms if self.data == "atoms" else self._draw(densities)
        dense = coding.dense_roles if isinstance(coding, Partial) else ()
        kept = [i for i, role in enumerate(densities.roles) if role not in dense]
        index = torch.tensor(kept)
        data = replace(data, statistics=dict(statistics or {})).rows(index)
        atoms = densities.atoms.rows(index)
        fit = coding.fit(data, self.algorithm1)
        params = {name: value.float().contiguous() for name, value in fit.params.items()}
        error, spikes = error_and_spikes(coding, atoms, params)
        return FittedNeurons(
            tuple(densities.sites[i] for i in kept),
            tuple(densities.roles[i] for i in kept),
            tuple(densities.layers[i] for i in kept),
            Fit(params, fit.curve),
            error / atoms.power(),
            spikes,
        )

    def _draw(self, densities: Densities) -> Atoms:
        generator = torch.Generator().manual_seed(self.seed)
        x = densities.sample(self.samples, generator).sort(-1).values
        weight = torch.full_like(x, 1 / self.samples)
        return Atoms(
            x,
            torch.zeros_like(x),
            weight,
            densities.atoms.maximum,
            extremes=densities.atoms.extremes,
        )


@dataclass(frozen=True)
class FittedNeurons:
    """Parameters per site, the loss curve, and the error and spikes they give on the atoms.

    nmse, spikes [sites] float64; the curve [sites, iterations] is the mean squared error in units of
    the squared scale.
    """

    sites: tuple[str, ...]
    roles: tuple[str, ...]
    layers: tuple[int, ...]
    fit: Fit
    nmse: Tensor
    spikes: Tensor

    def save(self, folder: Path) -> None:
        tensors = {f"param_{k}": v for k, v in self.fit.params.items()}
        tensors |= {"nmse": self.nmse, "spikes": self.spikes}
        if self.fit.curve is not None:
            tensors["curve"] = self.fit.curve.contiguous()
        save_file(tensors, folder / "neurons.safetensors")
        meta = {"sites": self.sites, "roles": self.roles, "layers": self.layers}
        (folder / "neurons.json").write_text(json.dumps(meta))

    @classmethod
    def load(cls, folder: Path) -> FittedNeurons:
        meta = json.loads((folder / "neurons.json").read_text())
        tensors = load_file(folder / "neurons.safetensors")
        params = {k[6:]: v for k, v in tensors.items() if k.startswith("param_")}
        sites, roles, layers = (tuple(meta[key]) for key in ("sites", "roles", "layers"))
        fit = Fit(params, tensors.get("curve"))
        return cls(sites, roles, layers, fit, tensors["nmse"], tensors["spikes"])
