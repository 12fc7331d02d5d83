"""What a fit gives: parameters, the neurons of all sites, and the coding together with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

ON_ATOMS = ("nmse", "spikes", "bound_db")


@dataclass(frozen=True)
class Fit:
    """Fitted parameters, site dimension first, and the loss of every iteration [sites, iterations]
    (None for a coding that is not trained by gradient)."""

    params: dict[str, Tensor]
    curve: Tensor | None = None


@dataclass(frozen=True)
class FittedNeurons:
    """Parameters per site, the loss curve, and the error and spikes they give on the atoms.

    nmse, spikes, bound_db [sites] float64, the last what `stages.analysis.bound.distance_db` says of
    the other two; the curve [sites, iterations] is the mean squared error in units of the squared scale.
    """

    sites: tuple[str, ...]
    roles: tuple[str, ...]
    layers: tuple[int, ...]
    fit: Fit
    nmse: Tensor
    spikes: Tensor
    bound_db: Tensor

    def save(self, folder: Path) -> None:
        tensors = {f"param_{k}": v for k, v in self.fit.params.items()}
        tensors |= {name: getattr(self, name).contiguous() for name in ON_ATOMS}
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
        return cls(sites, roles, layers, fit, *(tensors[name] for name in ON_ATOMS))


@dataclass(frozen=True)
class Conversion:
    """A coding (`stages.codings.base.Coding`) with the neurons fitted for it; None in its place means
    the dense model."""

    coding: Any
    neurons: FittedNeurons
