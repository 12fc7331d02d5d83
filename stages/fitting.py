"""Stage 3: fit the neurons of all sites, alone, on the estimated distribution of their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.analysis.bound import distance_db
from stages.atoms import Atoms
from stages.checkpoint.paper import PaperNeurons
from stages.codings.base import Coding, error_and_spikes
from stages.distribution import Densities
from stages.errors import InputError
from stages.fitted import Fit, FittedNeurons


@dataclass(frozen=True)
class Fitting:
    """`data`: `atoms` (the weighted atoms of the distribution) or `samples` (`samples` magnitudes
    a site drawn from it with `seed`, as the paper does). `neurons`: a folder of imported neurons
    (`stages.checkpoint.paper`), which take the place of a fit."""

    data: str = "atoms"
    samples: int = 100_000
    seed: int = 0
    neurons: str | None = None

    def __post_init__(self) -> None:
        if self.data not in ("atoms", "samples") or self.samples < 1:
            raise InputError(
                f"fitting.data={self.data!r} with fitting.samples={self.samples}: choose atoms, or "
                "samples with a positive number of them"
            )

    def for_coding(self, coding: Coding) -> Fitting:
        """This fitting without what the coding does not use, so that it does not enter its key."""
        if coding.trained and self.neurons is None:
            return self if self.data == "samples" else replace(self, samples=1, seed=0)
        return Fitting("atoms", 1, 0)

    def run(
        self,
        densities: Densities,
        coding: Coding,
        statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> FittedNeurons:
        """Fit `coding` to every site that it codes, as one batched problem.

        `statistics` are those that the coding declares, with the sites of `densities` first.
        """
        if self.data == "samples" and not coding.shares_levels:
            raise InputError(
                f"fitting.data=samples for {coding.name}, whose channels have their scales or means: "
                "samples are drawn from a site as a whole; give fitting.data=atoms, or "
                "coding.granularity=site coding.centre=none"
            )
        for name, tensors in (statistics or {}).items():
            if any(len(t) != len(densities.sites) for t in tensors.values()):
                raise InputError(
                    f"{coding.name} needs {name} at every site, but calibration missed some experts: "
                    "give more calibration.windows, or choose a coding without it"
                )
        data = densities.atoms if self.data == "atoms" else self._draw(densities)
        kept = [i for i, role in enumerate(densities.roles) if role not in coding.dense_roles]
        index = torch.tensor(kept)
        known = replace(data, statistics=dict(statistics or {}), roles=densities.roles)
        data = coding.choose(known.rows(index))
        atoms = densities.atoms.rows(index)
        atoms = coding.seen(replace(atoms, statistics=data.statistics))
        fit = coding.fit(coding.seen(data))
        given = fit.params | coding.scales(data)
        params = {name: value.float().contiguous() for name, value in given.items()}
        error, spikes = error_and_spikes(coding, atoms, params)
        return FittedNeurons(
            tuple(densities.sites[i] for i in kept),
            tuple(densities.roles[i] for i in kept),
            tuple(densities.layers[i] for i in kept),
            Fit(params, fit.curve),
            error / atoms.power(),
            spikes,
            distance_db(coding, atoms, params, error, spikes),
        )

    @staticmethod
    def imported(densities: Densities, coding: Coding, neurons: PaperNeurons) -> FittedNeurons:
        """Give the sites of `densities` imported neurons, with the error these have on it.

        Raises InputError where the coding or the sites are not theirs.
        """
        neurons.check(coding)
        index = neurons.rows(densities.roles, densities.layers)
        params = {name: value[index].contiguous() for name, value in neurons.params.items()}
        error, spikes = error_and_spikes(coding, densities.atoms, params)
        return FittedNeurons(
            densities.sites,
            densities.roles,
            densities.layers,
            Fit(params),
            error / densities.atoms.power(),
            spikes,
            distance_db(coding, densities.atoms, params, error, spikes),
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
