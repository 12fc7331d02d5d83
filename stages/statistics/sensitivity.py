"""The curvature of the loss at every site, by magnitude: one backward pass a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from stages.errors import InputError
from stages.fits.sensitivity import CELLS, Sensitivity, cell
from stages.model.offload import refuse_offloaded
from stages.model.sites import Site, find_sites
from stages.neurons.channels import per_channel
from stages.ports.counters import Counters, SiteCounter
from stages.ports.hooks import attached
from stages.ports.port import DensePort
from stages.ports.visibility import View
from stages.statistics import measure


@measure.register
def sensitivity(
    statistic: Sensitivity, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
) -> dict[str, Tensor]:
    """total, count [S, CELLS]: sum of f, and number of values, by cell of |x|; macs [S]:
    multiplications that a site's values enter; all float64, over `tokens` [S]."""
    return by_magnitude(statistic, model, ids, sites, {})


def by_magnitude(
    statistic: Sensitivity,
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    means: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The same by cell of |x - m| with the means m [C] of the channels of some sites; where there are any
    also plain_total and plain_count, by cell of |x|."""
    refuse_offloaded(model, "a coding's sensitivity", "leave coding.sensitivity off")
    if len(ids) < statistic.windows:
        raise InputError(
            f"sensitivity: {statistic.windows} windows asked of {len(ids)} calibration windows; give "
            "more calibration.windows"
        )
    generator = torch.Generator(device=model.device).manual_seed(statistic.seed)
    counters = Counters(sites, model.device)
    ports = {
        s.name: _CurvaturePort(SiteCounter(counters, i), model.device, means.get(s.name))
        for i, s in enumerate(sites)
    }
    embedding = model.get_input_embeddings()
    follow = embedding.register_forward_hook(lambda _, args, x: x.detach().requires_grad_())
    learns = [p for p in model.parameters() if p.requires_grad]
    try:
        for weight in learns:  # the derivative of values is asked, of no weight
            weight.requires_grad_(False)
        with torch.enable_grad(), attached(model, find_sites(model), ports):
            windows = ids[: statistic.windows].to(model.device).split(1)
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
            f"sensitivity: {len(silent)} sites passed no value in {statistic.windows} windows, the "
            f"first is {silent[0]}: give more coding.sensitivity.windows"
        )
    tokens = float(statistic.windows * ids.shape[1])
    plain = {
        "total": torch.stack([port.total for port in rows]).cpu(),
        "count": torch.stack([port.count for port in rows]).cpu(),
    }
    cells = plain
    if means:
        cells = {f"plain_{name}": tensor for name, tensor in plain.items()} | {
            "total": torch.stack([port.about_total for port in rows]).cpu(),
            "count": torch.stack([port.about_count for port in rows]).cpu(),
        }
    return cells | {
        "macs": torch.from_numpy(counters.frame(set())["macs"].to_numpy().copy()),
        "tokens": torch.full((len(rows),), tokens, dtype=torch.float64),
    }


class _CurvaturePort(DensePort):
    """Passes a value on, and adds the squares of its derivative by magnitude when it comes: `total` and
    `count` by that of the value, those `about` by that of the value less its channel's mean."""

    plain = False

    def __init__(self, counter: SiteCounter, device: torch.device, mean: Tensor | None) -> None:
        super().__init__(counter)
        self._mean = mean
        self.total, self.count = torch.zeros(2, CELLS, dtype=torch.float64, device=device)
        self.about_total, self.about_count = self.total, self.count
        if mean is not None:
            self.about_total, self.about_count = torch.zeros_like(self.total).repeat(2, 1)

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        self._follow(super().__call__(x, real, fanout), None)
        return x

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        probs, spikes = super().softmax(scores, scaling, view)
        self._follow(probs, view.mask)
        return probs, spikes

    def _follow(self, x: Tensor, mask: Tensor | None) -> None:
        value = x.detach()

        def add(derivative: Tensor) -> None:
            square = derivative.float().square()
            if mask is not None:
                square = square * mask
            self._add(value, square, self.total, self.count)
            if self._mean is not None:
                about = value.float() - per_channel(self._mean, value, 0.0)
                self._add(about, square, self.about_total, self.about_count)
            if mask is not None:  # what is masked is zero, and no value
                seen = mask.sum().to(self.count.device)
                self.count[0] -= (mask.numel() - seen) * x.shape[1]

        if x.requires_grad:
            x.register_hook(add)

    @staticmethod
    def _add(value: Tensor, square: Tensor, total: Tensor, count: Tensor) -> None:
        places = cell(value).flatten()
        total += torch.bincount(places, square.flatten().double(), CELLS).to(total.device)
        count += torch.bincount(places, minlength=CELLS).to(count.device)
