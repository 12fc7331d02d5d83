"""How much an error at a site costs the model: the curvature of its loss, by site and by magnitude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from stages.errors import InputError
from stages.model.offload import refuse_offloaded
from stages.model.sites import Site, find_sites
from stages.ports.attention import View
from stages.ports.counters import Counters, SiteCounter
from stages.ports.hooks import attached
from stages.ports.port import DensePort
from stages.registry import register

if TYPE_CHECKING:
    from stages.codings.base import Coding
    from stages.distribution import Atoms
    from stages.neurons.neurons import Params

CELLS_PER_OCTAVE = 4
LOWEST_OCTAVE = -40
CELLS = 64 * CELLS_PER_OCTAVE
PRIOR = 16.0


def cell(x: Tensor) -> Tensor:
    """The cell of |x|, a quarter of an octave wide from 2^-40 on, below and zero the first."""
    place = (x.abs().clamp(min=2.0**LOWEST_OCTAVE).log2() - LOWEST_OCTAVE) * CELLS_PER_OCTAVE
    return place.long().clamp(0, CELLS - 1)


@register("statistic/sensitivity", was="stages.llm.sensitivity.Sensitivity")
@dataclass(frozen=True)
class Sensitivity:
    """The diagonal of the Fisher information at every site, over the first `windows` windows.

    An error e at a value adds f e^2 / 2 to KL(dense || spiking), where f is the expected squared
    derivative of log p(y) for y drawn from the model itself (with `seed`): one backward pass tells
    all sites. Values of one magnitude share one f. Source: Fisher information as the second-order
    term of KL (Amari 1998; used for bit allocation by HAWQ, Dong et al. 2019).
    """

    name: str = "sensitivity"
    windows: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise InputError(f"sensitivity: windows={self.windows}: give at least 1")

    def run(
        self, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
    ) -> dict[str, Tensor]:
        """total, count [S, CELLS]: sum of f, and number of values, by cell of |x|; macs [S]:
        multiplications that a site's values enter; all float64, over `tokens` [S]."""
        refuse_offloaded(model, "a coding's sensitivity", "leave coding.sensitivity off")
        if len(ids) < self.windows:
            raise InputError(
                f"sensitivity: {self.windows} windows asked of {len(ids)} calibration windows; give "
                "more calibration.windows"
            )
        generator = torch.Generator(device=model.device).manual_seed(self.seed)
        counters = Counters(sites, model.device)
        ports = {
            s.name: _CurvaturePort(SiteCounter(counters, i), model.device)
            for i, s in enumerate(sites)
        }
        embedding = model.get_input_embeddings()
        follow = embedding.register_forward_hook(lambda _, args, x: x.detach().requires_grad_())
        learns = [p for p in model.parameters() if p.requires_grad]
        try:
            for weight in learns:  # the derivative of values is asked, of no weight
                weight.requires_grad_(False)
            with torch.enable_grad(), attached(model, find_sites(model), ports):
                windows = ids[: self.windows].to(model.device).split(1)
                for tokens in tqdm(windows, desc="sensitivity", unit="window", disable=None):
                    logits = model(tokens, use_cache=False).logits[0].float()
                    with torch.no_grad():
                        drawn = logits.softmax(-1).multinomial(1, generator=generator).squeeze(-1)
                    F.cross_entropy(logits, drawn, reduction="sum").backward()
        finally:
            follow.remove()
            for weight in learns:
                weight.requires_grad_(True)
        rows = [ports[site.name] for site in sites]
        silent = [s.name for s, row in zip(sites, rows, strict=True) if not int(row.count.sum())]
        if silent:  # experts: without a derivative they would have no weight in the fit, silently
            raise InputError(
                f"sensitivity: {len(silent)} sites passed no value in {self.windows} windows, the "
                f"first is {silent[0]}: give more coding.sensitivity.windows"
            )
        tokens = float(self.windows * ids.shape[1])
        return {
            "total": torch.stack([port.total for port in rows]).cpu(),
            "count": torch.stack([port.count for port in rows]).cpu(),
            "macs": torch.from_numpy(counters.frame(set())["macs"].to_numpy().copy()),
            "tokens": torch.full((len(rows),), tokens, dtype=torch.float64),
        }


class _CurvaturePort(DensePort):
    """Passes a value on, and adds the squares of its derivative by magnitude when it comes."""

    def __init__(self, counter: SiteCounter, device: torch.device) -> None:
        super().__init__(counter)
        self.total, self.count = torch.zeros(2, CELLS, dtype=torch.float64, device=device)

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        self._follow(super().__call__(x, real, fanout), None)
        return x

    def softmax(self, scores: Tensor, scaling: float, view: View, fanout: int) -> Tensor:
        probs = super().softmax(scores, scaling, view, fanout)
        self._follow(probs, view.mask)
        return probs

    def _follow(self, x: Tensor, mask: Tensor | None) -> None:
        value = x.detach()

        def add(derivative: Tensor) -> None:
            square = derivative.float().square()
            if mask is not None:
                square = square * mask
            places = cell(value).flatten()
            self.total += torch.bincount(places, square.flatten().double(), CELLS)
            self.count += torch.bincount(places, minlength=CELLS)
            if mask is not None:  # what is masked is zero, and no value
                self.count[0] -= mask.numel() * x.shape[1] - mask.sum() * x.shape[1]

        if x.requires_grad:
            x.register_hook(add)


def curvature(statistic: Mapping[str, Tensor]) -> Tensor:
    """Mean f of a value by cell of its magnitude, [S, CELLS]; a cell of few values leans on the
    mean of its site, as if it held `PRIOR` values more of that mean."""
    total, count = statistic["total"], statistic["count"]
    mean = total.sum(-1, keepdim=True) / count.sum(-1, keepdim=True)
    return (total + PRIOR * mean) / (count + PRIOR)


def loss_weight(statistic: Mapping[str, Tensor], atoms: Atoms) -> Tensor:
    """What a squared error of one at every atom adds to the loss, in nats a token, [S, K]."""
    f = curvature(statistic).gather(-1, cell(atoms.value))
    values = statistic["count"].sum(-1) / statistic["tokens"]
    return atoms.weight * f / 2 * values[:, None]


def predicted_loss(
    coding: Coding, atoms: Atoms, params: Params, statistic: Mapping[str, Tensor]
) -> Tensor:
    """KL(dense || spiking) a token that the error of each site alone adds, to second order, [S]."""
    x, weight = atoms.points()
    value, _ = coding.quantise(x.float(), {name: t.float() for name, t in params.items()})
    f = curvature(statistic).gather(-1, cell(x))
    per_value = ((value.double() - x) ** 2 * f * weight).sum(-1) / 2
    return per_value * statistic["count"].sum(-1) / statistic["tokens"]
